"""MkDocs hook: repository files that pages link to become pages of the site, so links work in both places.

A page links as in any checkout (`../cluster/README.md`). Markdown files become pages unchanged; others become a
page with its text in a block. Links on those pages are followed, too. Nothing is copied by hand, so nothing goes stale.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = ("README.md", "CONTRIBUTING.md", "cluster/README.md")  # named in the navigation
PREFIX = "repository/"  # of their addresses on the site
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}


def on_files(files: Files, *, config: Any, **_: Any) -> Files:
    """Adds a generated page for each file of the repository that a page links to, directly or through others."""
    texts = {f"docs/{f.src_uri}": Path(f.abs_src_path or "").read_text("utf-8") for f in files.documentation_pages()}
    waiting = [*ALWAYS, *(path for page, text in texts.items() for path in _targets(page, text))]
    added: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in added or path.startswith("docs/") or not (ROOT / path).is_file():
            continue
        added.add(path)
        text = (ROOT / path).read_text("utf-8")
        files.append(File.generated(config, _page_of(path), content=_page(path, text)))
        if path.endswith(".md"):
            waiting += _targets(path, text)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Points links at the generated pages."""
    here = page.file.src_uri
    source = here.removeprefix(PREFIX) if here.startswith(PREFIX) else f"docs/{here}"
    if here.startswith(PREFIX) and not source.endswith("README.md") and not (ROOT / source).is_file():
        return markdown  # a file's text in a block

    def led(match: re.Match[str]) -> str:
        path = _resolved(source, match[1])
        if path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif (ROOT / path).is_file():
            target = _page_of(path)
        else:
            return match[1]
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return _LINK.sub(led, markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Expands the sources on the recipe's page, which show a Config's fields and comments."""
    if page.file.src_uri != "reference/recipe.md":
        return html
    return html.replace('<details class="mkdocstrings-source"', '<details open class="mkdocstrings-source"')


def _targets(page: str, text: str) -> list[str]:
    return [_resolved(page, link) for link in _LINK.findall(text)]


def _resolved(page: str, link: str) -> str:
    """Repository path of a link on `page`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _page_of(path: str) -> str:
    return PREFIX + (path if path.endswith(".md") else f"{path}.md")


def _page(path: str, text: str) -> str:
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n````\n"
