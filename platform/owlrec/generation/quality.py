"""The quality gate: finds bad generated texts by rules alone, and decides what happens to them.

The faults are those of public LLM knowledge for recommenders (in REKI's released texts, movie prompts were sent
for books, so answers complain that the titles are books, and empty prompts, so answers ask for the titles) and those
of small models: loops, copied prompts, leaked chat tokens. `quality_form` finds faults in a text's form,
`quality_wording` faults in its wording.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, get_args

from pydantic import Field, field_validator

from owlrec.config import Config
from owlrec.prompting.frameworks import TEMPLATE_TOKEN
from owlrec.scenario import SCENARIOS, Scenario

# ---------------------------------------------------------------------------------------------------------------- words
# A text as words, in bytes: the rules compare millions of texts, and translating bytes is fast.


# Lower case, every digit a 0 (so that "3 stars; 4 stars" and numbered lines repeat), punctuation a space.
_WORD_BYTES = bytes(
    c if c >= 128 or chr(c).isalpha() or chr(c) == "'" else ord("0" if chr(c).isdigit() else " ")
    for c in (b + 32 if 65 <= b <= 90 else b for b in range(256))
)
QUOTED = re.compile(r'"[^"\n]*"|“[^“”\n]*”|«[^«»\n]*»|「[^「」\n]*」|《[^《》\n]*》')


def utf8(text: str) -> bytes:
    """The text's bytes, including lone surrogates."""
    return text.encode("utf-8", "surrogatepass")


def words_of(text: str) -> list[bytes]:
    """The text's words in UTF-8, which is translated 20 times faster than a non-ASCII str."""
    return utf8(text.replace("’", "'")).translate(_WORD_BYTES).split()


# --------------------------------------------------------------------------------------------------------- quality form
# Faults of a text's form, whatever its content: cut off, looping, copying its prompt, or in a broken
# encoding or another script. The thresholds are QualityRules.


_RUN_WORDS = 6  # good lists of ratings have runs of five: "- 4 stars", then "5. The"

# --- cut_off
_CLOSERS = "\"'”’»)]*_」』》）"
_SENTENCE_ENDS = tuple(".!?…。！？।؟")
_BARE_NUMBER = re.compile(r"(?:^|\n)\W*\d+[.)]$")  # the number of a list's next line


def is_cut_off(text: str) -> bool:
    """Whether a text that reached max_tokens stops within a sentence; greedy answers often happen to end with one.

    A closing quote alone does not end a sentence here: straight quotes open and close alike, and lists end in titles.
    """
    if not text.rstrip(_CLOSERS).endswith(_SENTENCE_ENDS):
        return True
    return text[text.rfind("\n") + 1 :].count('"') % 2 == 1 or bool(_BARE_NUMBER.search(text[-20:]))


# --- repetition
_TAIL_CHARS = 32
# A text with a third of its words repeated three times has hardly more distinct words than this.
_MAX_DISTINCT_SHARE = 0.65
_MIN_LIST_LINES = 6
_NO_DIGITS = str.maketrans("", "", "0123456789")


def repeats(
    text: str, words: Sequence[bytes], min_repeats: int, max_repeated_share: float, max_duplicate_lines_share: float
) -> bool:
    """Whether the text loops: at its end (also without spaces), in runs of words, or over the lines of a list.

    An enumeration ("The user liked X for its plot. The user liked Y for ...") repeats its frame, but the content
    differs, so no run of _RUN_WORDS words repeats.
    """
    if len(text) >= min_repeats * _TAIL_CHARS and text.count(text[-_TAIL_CHARS:]) >= min_repeats:
        return True
    if len(set(words)) > _MAX_DISTINCT_SHARE * len(words):
        return False
    # Each word pair in such a run occurs min_repeats times; most texts have too many different pairs.
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
_TITLE = re.compile(r'"[^"\n]*"(?:\s*\d[\d.]*\s+\w+)?')  # with its rating; listing titles again is not an echo


def may_copy(text: str, prompt: str) -> bool:
    """Whether one of a few slices of `text` occurs in `prompt`: a long copy would cover at least one."""
    stride = max(len(text) // _WINDOWS, _WINDOW_CHARS // 2)
    return any(text[i : i + _WINDOW_CHARS] in prompt for i in range(0, max(len(text) - _WINDOW_CHARS, 0) + 1, stride))


def copied_share(text: str, prompt: str) -> float:
    """Share of the text's words in runs that also occur in the prompt, without titles."""
    words, asked = (words_of(_TITLE.sub(" ", t)) for t in (text, prompt))
    return _covered_share(words, _runs(words), set(_runs(asked)))


def _runs(words: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    return list(zip(*(words[i:] for i in range(_RUN_WORDS)), strict=False))


def _covered_share(words: Sequence[bytes], runs: Sequence[tuple[bytes, ...]], wanted: set[tuple[bytes, ...]]) -> float:
    """Share of the words in one of the `wanted` runs."""
    covered, end = 0, 0
    for start, run in enumerate(runs):
        if run in wanted:
            covered += start + _RUN_WORDS - max(start, end)
            end = start + _RUN_WORDS
    return covered / len(words) if words else 0.0


# --- language
_MOJIBAKE = re.compile("Ã[\u0080-\u00bf]|â€|Â[\u00a0-\u00bf]|\ufffd")
_MOSTLY = 0.8  # of the characters: above it, scripts need not be counted
_EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "FULLWIDTH")  # mixed in one sentence


def is_broken(text: str, prompt: str) -> bool:
    """Whether bytes were decoded with the wrong encoding, unless the prompt's own text already was.

    A replacement character at the very end comes from max_tokens splitting a character.
    """
    text = text.rstrip("\ufffd")
    return any(c in text for c in "Ãâ\ufffdÂ") and any(m[0] not in prompt for m in _MOJIBAKE.finditer(text))


def script_share(text: str, prompt: str) -> float:
    """Share of the text's letters in the prompt's dominant script; 1 if either has no letters."""
    if all(len(t.encode("ascii", "ignore")) >= _MOSTLY * len(t) for t in (text, prompt)):
        return 1.0
    asked, said = (Counter(_script(c) for c in QUOTED.sub("", t) if c.isalpha()) for t in (prompt, text))
    return said[max(asked, key=asked.__getitem__)] / said.total() if asked and said else 1.0


@lru_cache(maxsize=8192)
def _script(letter: str) -> str:
    """The first word of the letter's Unicode name: LATIN, CYRILLIC, ARABIC."""
    script = unicodedata.name(letter, "").split(" ")[0]
    return "CJK" if script in _EAST_ASIAN else script.split("-")[0]


# ------------------------------------------------------------------------------------------------------ quality wording
# Texts that talk about their task instead of doing it: refusals, requests for data, talk about another domain's items.
#
# Knowledge is written in the third person. A hero who cannot go on, or an app that asks users to share, appears in
# quotes or reported speech. So the rules look for the first person and for the reader, in the text without quotes. They
# first check the set of its words, so their expressions rarely run on a good text.


class WordingRules:
    """The rules of one scenario, compiled once."""

    def __init__(self, scenario: Scenario, min_foreign_mentions: int, min_foreign_ratio: float) -> None:
        """See QualityRules."""
        self._asks, self._questions = _asks_for_input(scenario)
        self._domain = _DomainRule(scenario, min_foreign_mentions, min_foreign_ratio)

    def flags(self, text: str, words: Sequence[bytes]) -> dict[str, object]:
        """Flag -> whether a text with these words has it; missing flags are False."""
        vocabulary = set(words)
        refuses, asks = vocabulary & _REFUSAL_WORDS, vocabulary & _INPUT_WORDS
        foreign = self._domain.suspects(words, vocabulary)
        if not (refuses or asks or foreign or "?" in text):
            return {}
        said = QUOTED.sub('""', text).replace("’", "'").lower()
        sentences = _SENTENCE.findall(said)
        return {
            "refusal": any(map(_REFUSAL.search, _holding(sentences, refuses))),
            "asks_for_input": any(map(self._asks.search, _holding(sentences, asks)))
            or ("?" in said and self._questions.search(said)),
            "wrong_domain": foreign and self._domain.is_foreign(said, sentences, words, foreign),
        }


_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*")


def _set_of(words: str) -> frozenset[bytes]:
    return frozenset(w.encode() for w in words.split())


def _any(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(re.escape(w) for w in sorted(words, key=len, reverse=True))})"


def _holding(sentences: Sequence[str], words: Iterable[bytes]) -> list[str]:
    """Sentences with one of `words`: the rules' expressions are slow, and most sentences have none."""
    wanted = [w.decode("utf-8", "surrogatepass") for w in words]
    return [s.strip() for s in sentences if any(w in s for w in wanted)] if wanted else []


_REFUSAL_WORDS = _set_of("i i'm i've me my unable sorry apologies request task question")
# An author of knowledge has no reason to say that "I" do not, cannot or will not do something. Only the complaint of
# seeing no titles counts as a request for them.
_REFUSAL = re.compile(
    r"^(?:(?:i'm|i am) )?(?:(?:so|very|really) )?(?:sorry|apologies)\b"
    r"|\bi(?:'m| am| was|'d| would| must| have to| need to| do| will| could| have)?(?: (?:\w+ly|afraid i|also|just))?"
    r" (?:cannot|can ?not|can't|couldn't|won't|don't|not|never|unable|decline|refuse|lack|regret|apologi[sz]e|have no)"
    r"\b(?! (?:see|find|know wh)\w*)|^unable to \w+ (?:the|this|a|any|your)\b"
    r"|\b(?:request|task|question)\b.{0,20}? (?:cannot|can't|could not) be\b"
    r"|\bas an? (?:\w+ ){0,2}(?:ai|language model|assistant)\b.{0,60}\bi\b"
    r"|\bi(?: am|'m) (?:(?:just|only|merely) )?an? (?:ai|artificial|(?:\w+ )?language model)\b"
    r"|(?:not|n't|im)(?: be)? ?(?:possible|appropriate|ethical) for me to\b"
    r"|\b(?:against|beyond|within|outside|violates?) my (?:\w+ )?(?:guidelines|capabilities|programming|training)\b"
    r"|\bmy (?:training|knowledge cutoff|guidelines)\b"
)

_INPUT_WORDS = _set_of("please kindly free you you've you'll i i'd i'll me provided supplied list listed")
_GIVE = (
    r"(?:provid|shar|giv|(?:re)?send|sent|tell|told|list|specif|suppl|past|enter|upload|clarif|confirm|includ|add|nam|attach|"
    r"describ|mention|let me know)\w*"
)


def _asks_for_input(scenario: Scenario) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Requests for data: in a sentence with one of _INPUT_WORDS, and as a question."""
    thing = rf"(?:{_any(_nouns(scenario))}|titles?|items?|names?|lists?|history|details?|information|data|context)"
    requests = (
        rf"(?:^|[:;,]\s*|\b(?:and|so|then|but) )(?:just )?(?:please|kindly) {_GIVE}|\bjust (?:send|give|tell|paste)\b",
        rf"\b(?:could|can|would|will|may) (?:you|i)(?: please| kindly)? (?:{_GIVE}|have|get)\b",
        rf"\byou (?:have not|haven't|did not|didn't|forgot to) {_GIVE}|\bfeel free to {_GIVE}",
        rf"^(?=.*\b(?:i|me)\b).*\b(?:once|if|when|after|as soon as) you(?:'ll| can| could| would)?(?: please)? {_GIVE}",
        r"\b(?:would|did|do) you (?:mind|mean|have)\b|\blet me know\b|^(?:send|give|tell|show) me\b",
        rf"\bi(?:'d| would| will|'ll)?(?: also| still| first)? (?:need|require) (?:[\w']+ ){{0,4}}?(?:know|{thing})\b",
        rf"(?:^|\b(?:but|that|as|since|because) )no (?:\w+ ){{0,3}}?{thing} (?:were|was|ha(?:ve|s) been|are) {_GIVE}",
        rf"\bthere (?:are|were|is|was) no {thing} (?:[\w']+ ){{0,4}}?(?:prompt|message|question|{_GIVE})",
        rf"\b{thing} (?:does not|doesn't|do not|don't) (?:contain|include|name|mention|list) any {thing}\b",
        rf"\b{thing} (?:\w+ ){{0,5}}?(?:is|are|was|seems|appears)(?: to be)? (?:empty|missing|blank)\b",
    )
    question = rf"(?:^|[.!?\n]\s*)(?:which|what) (?:are |were )?(?:the )?{thing}\b[^.?!\n]{{0,60}}\?"
    return re.compile("|".join(requests)), re.compile(question)


# --- wrong_domain
_NOUNS: dict[str, str] = {  # by items; in addition to the scenario's own words for them
    "movies": "movie movies film films viewer viewers",
    "books": "book books novel novels reader readers author authors",
    "songs": "song songs album albums listener listeners",
    "apps": "app apps",
    "ads": "ad ads advert adverts advertisement advertisements",
    "news articles": "article articles headline headlines",
}
# Ads, apps and news can be about anything, including films and books, so there only a plain statement counts.
_WORKS = ("movies", "books", "songs")
_STATEMENT_WORDS = _set_of(
    "not rather instead isn't aren't titles fact actually all items entries works things these those"
)


def _nouns(scenario: Scenario) -> set[str]:
    return {*_NOUNS.get(scenario.items, "").split(), scenario.item.lower(), scenario.items.lower()}


def _word_forms(nouns: Iterable[str]) -> frozenset[bytes]:
    """Single words, including possessives; "article" for "news article"."""
    return frozenset(utf8(n.split()[-1] + s) for n in nouns if n.strip() for s in ("", "'s"))


class _DomainRule:
    def __init__(self, scenario: Scenario, min_mentions: int, min_ratio: float) -> None:
        self._min_mentions, self._min_ratio = min_mentions, min_ratio
        own = _nouns(scenario)
        others = {other.items: _nouns(other) for other in SCENARIOS.values() if own.isdisjoint(_nouns(other))}
        foreign, mine = _any(set().union(*others.values())), _any(own)
        within, no = r".{0,40}?", r"(?:not|rather than|instead of|aren't|isn't)(?: really| actually)?(?: an?| the)?"
        self._statement = re.compile(
            rf"\b(?:are|is|be|were|was)\b{within}\b{foreign}\b{within}\b{no} {mine}\b"
            rf"|\b{mine} are (?:all|actually|really|in fact) {foreign}(?<=s)\b"
            rf"|\b{no} {mine} (?:but|they are|it is){within}\b{foreign}\b"
            rf"|\b(?:titles|items|entries|works|things|all of (?:them|these|those)|these|those)\b{within}"
            rf"\b(?:are|be)(?: all| actually| mostly| only)* {foreign}\b"
        )
        self._own = _word_forms(own)
        self._words = _word_forms(set().union(*others.values()))
        counted = (*_WORKS, "apps") if scenario.items in _WORKS else ()
        self._counted = [_word_forms(nouns) for name, nouns in others.items() if name in counted]

    def suspects(self, words: Sequence[bytes], vocabulary: set[bytes]) -> set[bytes]:
        """Other domains' nouns in a text that may be about them, including quotations; mostly none."""
        suspicious = vocabulary & self._words
        if suspicious and (self._often(words, suspicious) or not _STATEMENT_WORDS.isdisjoint(vocabulary)):
            return suspicious
        return set()

    def is_foreign(self, said: str, sentences: Sequence[str], words: Sequence[bytes], suspects: set[bytes]) -> bool:
        """Whether a text (`said`: lowercase, without quotations) treats the items as another domain's."""
        if any(map(self._statement.search, _holding(_holding(sentences, suspects), _STATEMENT_WORDS))):
            return True
        if not self._often(words, suspects):
            return False
        counts = Counter(words_of(said))
        most = max(sum(counts[w] for w in nouns) for nouns in self._counted)
        own = sum(counts[w] for w in self._own)
        return most >= max(self._min_mentions, self._min_ratio * own)

    def _often(self, words: Sequence[bytes], suspects: set[bytes]) -> bool:
        return bool(self._counted) and sum(map(words.count, suspects)) >= self._min_mentions


# -------------------------------------------------------------------------------------------------------------- quality


# fmt: off
Flag = Literal[
    "empty", "too_short", "cut_off", "repetition", "refusal", "asks_for_input", "wrong_domain", "prompt_echo",
    "template_tokens", "language",
]
# fmt: on
FLAGS: tuple[Flag, ...] = get_args(Flag)
# keep: the text with its flag; retry: generate again with the retry sampling; fall_back: use a fallback text;
# drop: move the row to the dead letters. In order of severity.
Policy = Literal["keep", "retry", "fall_back", "drop"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

# Other sampling frees a model from a loop or a refusal. It does not provide more tokens (cut_off), a better
# prompt (wrong_domain) or more to say (too_short), and such a text still has some knowledge. The effect of an echo or a
# foreign language depends on the encoder, so these are flagged as a reason to check the prompts and the model.
_RETRIED: tuple[Flag, ...] = ("empty", "repetition", "refusal", "asks_for_input", "template_tokens")
DEFAULT_POLICY: dict[Flag, Policy] = {flag: "retry" if flag in _RETRIED else "keep" for flag in FLAGS}


@dataclass(frozen=True)
class QualityRules:
    """Thresholds of the flags, and sampling of a retry. Shares are of the text's words unless stated otherwise.

    No recipe sets these. Part of the texts' fingerprint, by value.
    """

    # About ten English words, fewer than any reason needs; in bytes, since a Chinese character (3) equals about 3
    # letters.
    min_bytes: int = 60
    # A run of words that occurs this often is a loop; a summary at the end may cause two.
    min_repeats: int = 3
    max_repeated_share: float = 1 / 3
    # Share of a list's lines that repeat an earlier line: small models return to two or three titles.
    max_duplicate_lines_share: float = 1 / 3
    # A restated question is short compared with its answer; above this share the answer has hardly begun.
    max_copied_share: float = 0.4
    # Number of another domain's nouns, and the ratio to the scenario's own: a film's text may name the book it is based
    # on once or twice, but also says "film".
    min_foreign_mentions: int = 3
    min_foreign_ratio: float = 4.0
    min_script_share: float = 0.5  # share of letters in the prompt's script
    max_retries: int = 2  # each costs a whole answer
    retry_temperature: float = 0.7  # greedy decoding would write the same text again
    retry_repetition_penalty: float = 1.1  # mild: names and titles must repeat


RULES = QualityRules()


class QualityConfig(Config):
    """Actions on flagged texts."""

    # Of each flag; what is set adds to the defaults. off: no text is looked at.
    policy: dict[Flag, Policy] | Literal["off"] = Field(default_factory=lambda: dict(DEFAULT_POLICY))

    @field_validator("policy")
    @classmethod
    def _with_defaults(cls, policy: dict[Flag, Policy] | Literal["off"]) -> dict[Flag, Policy] | Literal["off"]:
        return policy if policy == "off" else {**DEFAULT_POLICY, **policy}


class QualityGate:
    """The rules of one scenario, compiled once and shared by all rows of a job."""

    def __init__(self, config: QualityConfig, scenario: Scenario) -> None:
        self._policy = None if config.policy == "off" else config.policy
        self._wording = WordingRules(scenario, RULES.min_foreign_mentions, RULES.min_foreign_ratio)

    def flags(self, text: str, *, prompt: str, finish_reason: str) -> tuple[Flag, ...]:
        """Faults of `text`, in the order of FLAGS; () for a good text, and always if the policy is off.

        prompt: the model's prompt; prepend the system turn to include its echo.
        finish_reason: "stop" or "length" (see Completion).
        """
        if self._policy is None:
            return ()
        text = text.strip()
        if not text:
            return ("empty",)
        words = words_of(text)
        flagged: dict[str, object] = {
            "too_short": len(text) < RULES.min_bytes and len(utf8(text)) < RULES.min_bytes,
            "cut_off": finish_reason == "length" and is_cut_off(text),
            "repetition": repeats(
                text,
                words,
                RULES.min_repeats,
                RULES.max_repeated_share,
                RULES.max_duplicate_lines_share,
            ),
            **self._wording.flags(text, words),
            "prompt_echo": may_copy(text, prompt) and copied_share(text, prompt) >= RULES.max_copied_share,
            "template_tokens": ("<" in text or "[" in text) and TEMPLATE_TOKEN.search(text),
            "language": not text.isascii()
            and (is_broken(text, prompt) or script_share(text, prompt) < RULES.min_script_share),
        }
        return tuple(flag for flag in FLAGS if flagged.get(flag))

    def action(self, flags: Iterable[Flag]) -> Policy:
        """The most severe policy of `flags`; "keep" without flags."""
        policy = self._policy or {}
        return max((policy[f] for f in flags), key=POLICIES.index, default="keep")
