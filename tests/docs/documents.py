"""Reads the documents as their readers do: blocks, inline code, links, anchors."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "cluster/README.md", "cluster/dashboards/README.md")),
    *PAGES,
]
_BLOCK = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)\s*$", re.M | re.S)
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    line: int
    language: str  # "" where none is named: those are commands
    title: str  # the file that it is, "" for none
    text: str
    section: str  # the heading of the second level that it stands under


def name_of(document: Path) -> str:
    """Its path in the repository."""
    return document.relative_to(ROOT).as_posix()


def blocks(document: Path) -> list[Block]:
    """All fenced blocks, in order."""
    text = document.read_text("utf-8")
    fences = []
    for match in _BLOCK.finditer(text):
        before, info = text[: match.start()], match["info"].strip()
        title = _TITLE.search(info)
        sections = re.findall(r"^## (.+)$", _BLOCK.sub("", before), re.M)
        fences.append(
            Block(
                before.count("\n") + 1,
                info.split(" ")[0],
                title[1] if title else "",
                match["text"],
                sections[-1] if sections else "",
            )
        )
    return fences


def prose(document: Path) -> str:
    """The text without fenced blocks."""
    return _BLOCK.sub("", document.read_text("utf-8"))


def inline_codes(document: Path) -> list[str]:
    """What stands in single ticks, a break within it read as a blank."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(document))]


def links(document: Path) -> list[str]:
    """The targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?<!`)`[^`]+`(?!`)", "", prose(document)))


def anchors(document: Path) -> set[str]:
    """What a link may name behind the #, by GitHub's rule: letters, digits, dashes and underscores stay."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.M)
    return {re.sub(r"[^\w -]", "", title.lower().replace("`", "")).replace(" ", "-") for title in titles}
