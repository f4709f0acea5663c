"""Makes untrusted text safe to quote in a prompt, and fits a history into a token budget.

Titles and profile fields come from outside: a title may hold another model's control tokens, bidirectional overrides
or a whole page. What is removed could otherwise end the user's turn early and let a title give the model orders.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence

# Turn, sentence and instruction markers of the chat templates in use (ChatML, Llama 2 and 3, Gemma, Mistral,
# DeepSeek, GLM).
TEMPLATE_TOKEN = re.compile(
    r"<[|｜][^<>]{0,60}?[|｜]>|</?s>|\[/?INST\]|\[/?SYSTEM_PROMPT\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
    r"|\[gMASK\]|<sop>|</?think>",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[<\[]")
_CHARS_PER_TOKEN = 12  # more than any tokenizer packs into one
_ROOM = 50  # times the wanted length that are read at all: a page of controls in place of a title costs no seconds


def clean_text(text: str, *, max_chars: int = 200) -> str:
    """`text` on one line, without control characters or chat-template tokens, at most `max_chars` long.

    Double quotes become single ones, since prompts quote titles in double quotes. A cut is marked by an ellipsis.
    """
    if text.isascii() and text.isprintable() and not _MARKUP.search(text):  # nearly every title: nothing to remove
        return _on_one_line(text, max_chars)
    text = unicodedata.normalize("NFC", text[: max_chars * _ROOM])
    # Cc and Cf hold control, zero-width and bidirectional characters; Co and Cs private use and lone surrogates.
    text = "".join(
        " " if c in "\t\n\r\v\f" else c
        for c in text
        if c in "\t\n\r\v\f" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs")
    )
    while True:  # removing one token may join the halves of another
        stripped = TEMPLATE_TOKEN.sub("", text)
        if stripped == text:
            break
        text = stripped
    return _on_one_line(text, max_chars)


def _on_one_line(text: str, max_chars: int) -> str:
    text = " ".join(text.split()).replace('"', "'")
    return text if len(text) <= max_chars else text[: max_chars - 1].rstrip() + "…"


def fit_recent(entries: Sequence[str], budget_tokens: int, count_tokens: Callable[[str], int]) -> Sequence[str]:
    """The longest run of the most recent `entries` (last = newest) whose token counts add up to at most
    `budget_tokens`.

    The oldest go first: what a user did lately tells most about what comes next. May be empty.
    """
    spent = 0
    for kept, entry in enumerate(reversed(entries)):
        spent += count_tokens(entry)
        if spent > budget_tokens:
            return entries[len(entries) - kept :]
    return entries


def first_tokens(text: str, budget_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """The beginning of `text`, cleaned, in whole words that make at most `budget_tokens`.

    Where not even the first word fits, as in a script that puts no blanks between words, it is cut inside.
    """
    if budget_tokens < 1:
        return ""
    text = clean_text(text, max_chars=_CHARS_PER_TOKEN * budget_tokens)
    if count_tokens(text) <= budget_tokens:
        return text
    return _longest(text.split(), " ", budget_tokens, count_tokens) or _longest(text, "", budget_tokens, count_tokens)


def _longest(pieces: Sequence[str], glue: str, budget_tokens: int, count_tokens: Callable[[str], int]) -> str:
    ends = range(1, len(pieces) + 1)
    return glue.join(pieces[: bisect_right(ends, budget_tokens, key=lambda end: count_tokens(glue.join(pieces[:end])))])


def in_budget(entries: Sequence[str], budget_tokens: int, count_tokens: Callable[[str], int]) -> list[int]:
    """Where to part `entries`, so that each run of them has at most `budget_tokens`, or is a single longer entry.

    Returns the end of each run, ascending; the last one is len(entries). None is left out.
    """
    ends, spent = list[int](), 0
    for place, entry in enumerate(entries):
        tokens = count_tokens(entry)
        if place and spent + tokens > budget_tokens:
            ends.append(place)
            spent = 0
        spent += tokens
    return [*ends, len(entries)] if entries else []
