"""Film titles as people write them: an LLM knows "The Usual Suspects" better than a catalogue's "Usual Suspects, The".

The year stays in the title, because it tells remakes apart, and is also returned by itself as an attribute.
"""

import re

_ARTICLES = (
    r"The|A|An|Le|La|Les|L'|Un|Une|"  # English, French
    r"Il|Lo|Gli|I|Uno|Una|El|Los|Las|O|Os|As|"  # Italian, Spanish, Portuguese
    r"Der|Die|Das|Den|Ein|Eine|De|Het|Een|Det|En|Ett"  # German, Dutch, Scandinavian
)
# An article counts only at the end of the title or of an alternative title in brackets, so "Paris, Texas" stays.
_TRAILING_ARTICLE = re.compile(rf"(^|\((?:a\.k\.a\. )?)([^()]+), ({_ARTICLES})(?=\)|\s*\(|\s*$)")
_YEAR = re.compile(r"\((\d{4})(?:[-–]\d{0,4})?\)")


def natural_title(title: str) -> str:
    """`title` with trailing articles in front: "Usual Suspects, The (1995)" becomes "The Usual Suspects (1995)"."""

    def moved(match: re.Match[str]) -> str:
        opening, name, article = match.groups()
        return f"{opening}{article}{'' if article.endswith(chr(39)) else ' '}{name}"

    return _TRAILING_ARTICLE.sub(moved, title.strip())


def title_year(title: str) -> str:
    """The last four-digit year in brackets in `title`, or ""."""
    years = _YEAR.findall(title)
    return years[-1] if years else ""
