"""A knowledge text as paragraphs, the factor that each is about set apart where the text names it."""

import re
from dataclasses import dataclass

# "Genre: ...", "**Mood** - ...", "2. Director/screenwriter: ...": what models put before what they say of a factor.
_FACTOR = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])?\s*\**(?P<factor>[A-Za-z][\w /&'’,-]{1,58}?)\**\s*(?::\**|\s[-–—])\s+")


@dataclass(frozen=True)
class Paragraph:
    """One paragraph. factor: "" where the text names none."""

    factor: str
    text: str


def paragraphs(text: str) -> list[Paragraph]:
    """The paragraphs of a text, as plain strings: whoever shows them escapes them."""
    found = []
    for line in text.splitlines():
        if not line.strip():
            continue
        match = _FACTOR.match(line)
        factor = match["factor"].strip() if match else ""
        found.append(Paragraph(factor, line[match.end() :].strip() if match else line.strip()))
    return found
