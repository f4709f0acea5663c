"""What a text's form betrays, whatever it says: that it was cut off, loops, copies its prompt, or came in a broken
encoding or another script. The thresholds are QualityConfig's.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from owlrec.generation.words import QUOTED, words_of

_RUN_WORDS = 6  # "- 4 stars" and the next line's "5. The" make runs of five in any good list of ratings

# --- cut_off
_CLOSERS = "\"'”’»)]*_」』》）"
_SENTENCE_ENDS = tuple(".!?…。！？।؟")
_BARE_NUMBER = re.compile(r"(?:^|\n)\W*\d+[.)]$")  # the number of a list's next line


def is_cut_off(text: str) -> bool:
    """Whether a text that ran into max_tokens stops within a sentence; greedy answers often end just with one.

    A closing quote alone ends no sentence here: straight quotes open and close alike, and lists end in titles.
    """
    if not text.rstrip(_CLOSERS).endswith(_SENTENCE_ENDS):
        return True
    return text[text.rfind("\n") + 1 :].count('"') % 2 == 1 or bool(_BARE_NUMBER.search(text[-20:]))


# --- repetition
_TAIL_CHARS = 32
# A text with a third of its words said three times over hardly has more distinct words than this.
_MAX_DISTINCT_SHARE = 0.65
_MIN_LIST_LINES = 6
_NO_DIGITS = str.maketrans("", "", "0123456789")


def repeats(
    text: str, words: Sequence[bytes], min_repeats: int, max_repeated_share: float, max_duplicate_lines_share: float
) -> bool:
    """Whether the text loops: at its end (also without spaces), in runs of words, or over the lines of a list.

    An enumeration ("The user liked X for its plot. The user liked Y for ...") repeats its frame, but what it says
    differs, and so no run of _RUN_WORDS words returns.
    """
    if len(text) >= min_repeats * _TAIL_CHARS and text.count(text[-_TAIL_CHARS:]) >= min_repeats:
        return True
    if len(set(words)) > _MAX_DISTINCT_SHARE * len(words):
        return False
    # Of the pairs of words within such runs each is said min_repeats times; most texts have too many different pairs.
    pairs = len(words) - 1
    within = max_repeated_share * len(words) * (1 - 1 / _RUN_WORDS)
    if len(set(pairwise(words))) <= pairs - within * (1 - 1 / min_repeats):
        runs = _runs(words)
        often = {run for run, count in Counter(runs).items() if count >= min_repeats}
        if often and _covered_share(words, runs, often) >= max_repeated_share:
            return True
    if text.count("\n") < _MIN_LIST_LINES - 1:
        return False
    lines = [line.translate(_NO_DIGITS).strip(" .-*•)") for line in text.split("\n") if line.strip()]
    return len(lines) >= _MIN_LIST_LINES and 1 - len(set(lines)) / len(lines) >= max_duplicate_lines_share


# --- prompt_echo
_WINDOWS = 8
_WINDOW_CHARS = 32
_TITLE = re.compile(r'"[^"\n]*"(?:\s*\d[\d.]*\s+\w+)?')  # with the rating behind it: listing them again is no echo


def may_copy(text: str, prompt: str) -> bool:
    """Whether one of a few slices of `text` stands in `prompt`: a long copy cannot lie between them all."""
    stride = max(len(text) // _WINDOWS, _WINDOW_CHARS // 2)
    return any(text[i : i + _WINDOW_CHARS] in prompt for i in range(0, max(len(text) - _WINDOW_CHARS, 0) + 1, stride))


def copied_share(text: str, prompt: str) -> float:
    """Share of the text's words in runs that stand in the prompt too, titles left out."""
    words, asked = (words_of(_TITLE.sub(" ", t)) for t in (text, prompt))
    return _covered_share(words, _runs(words), set(_runs(asked)))


def _runs(words: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    return list(zip(*(words[i:] for i in range(_RUN_WORDS)), strict=False))


def _covered_share(words: Sequence[bytes], runs: Sequence[tuple[bytes, ...]], wanted: set[tuple[bytes, ...]]) -> float:
    """Share of the words that stand in one of the `wanted` runs."""
    covered, end = 0, 0
    for start, run in enumerate(runs):
        if run in wanted:
            covered += start + _RUN_WORDS - max(start, end)
            end = start + _RUN_WORDS
    return covered / len(words) if words else 0.0


# --- language
_MOJIBAKE = re.compile("Ã[\u0080-\u00bf]|â€|Â[\u00a0-\u00bf]|\ufffd")
_MOSTLY = 0.8  # of the characters: above it nobody needs to count scripts
_EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "FULLWIDTH")  # mixed in one sentence


def is_broken(text: str, prompt: str) -> bool:
    """Whether bytes were read in the wrong encoding, unless the prompt's own text came so.

    A replacement character at the very end is where max_tokens cut a character in two.
    """
    text = text.rstrip("\ufffd")
    return any(c in text for c in "Ãâ\ufffdÂ") and any(m[0] not in prompt for m in _MOJIBAKE.finditer(text))


def script_share(text: str, prompt: str) -> float:
    """Share of the text's letters that are in the prompt's dominant script; 1 where either has none to count."""
    if all(len(t.encode("ascii", "ignore")) >= _MOSTLY * len(t) for t in (text, prompt)):
        return 1.0
    asked, said = (Counter(_script(c) for c in QUOTED.sub("", t) if c.isalpha()) for t in (prompt, text))
    return said[max(asked, key=asked.__getitem__)] / said.total() if asked and said else 1.0


@lru_cache(maxsize=8192)
def _script(letter: str) -> str:
    """The first word of the letter's Unicode name: LATIN, CYRILLIC, ARABIC."""
    script = unicodedata.name(letter, "").split(" ")[0]
    return "CJK" if script in _EAST_ASIAN else script.split("-")[0]
