"""A text as words: bytes, since rules that read millions of texts compare them, and translating bytes is fast."""

import re

# Lower case, every digit a 0 (so that "3 stars; 4 stars" and numbered lines repeat), punctuation a space.
_WORD_BYTES = bytes(
    c if c >= 128 or chr(c).isalpha() or chr(c) == "'" else ord("0" if chr(c).isdigit() else " ")
    for c in (b + 32 if 65 <= b <= 90 else b for b in range(256))
)
QUOTED = re.compile(r'"[^"\n]*"|“[^“”\n]*”|«[^«»\n]*»|「[^「」\n]*」|《[^《》\n]*》')


def utf8(text: str) -> bytes:
    """The text's bytes, half a surrogate pair included."""
    return text.encode("utf-8", "surrogatepass")


def words_of(text: str) -> list[bytes]:
    """The text's words in UTF-8, which is translated 20 times faster than a str that is not ASCII."""
    return utf8(text.replace("’", "'")).translate(_WORD_BYTES).split()
