"""Cards after their files were rewritten: a shard that lost a user is as done as it was, with other digests."""

import re
from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from owlrec.erasure.rows import Rewritten
from owlrec.errors import WorkspaceError
from owlrec.shards import Artifact, Card
from owlrec.workspace import Workspace

_CARD = re.compile(r"(.+)/cards/.+/(\d{8,})\.json")
_NUMBER = re.compile(r".*/(\d{8,})\.\w+")


def update_cards(workspace: Workspace, paths: Sequence[str], rewritten: Iterable[Rewritten], numbers: set[int]) -> None:
    """Writes the cards that name rewritten files again, with these and the rows that are left.

    paths: of all files of the workspace. numbers: that shards of the users may have (places.shard_numbers). A card that
    knows a file already as it is now is left alone.
    """
    cards: dict[str, list[tuple[int, str]]] = {}
    for path in paths:
        if match := _CARD.fullmatch(path):
            cards.setdefault(match[1], []).append((int(match[2]), path))
    by_artifact: dict[str, dict[str, Rewritten]] = {}
    for file in rewritten:
        roots = [root for root in cards if file.path.startswith(f"{root}/")]
        if roots:
            root = max(roots, key=len)
            by_artifact.setdefault(root, {})[file.path[len(root) + 1 :]] = file
    for root, files in by_artifact.items():
        # A card of several shards has the number of one of them under fewer shards.
        own = {int(match[1]) for path in files if (match := _NUMBER.fullmatch(f"/{path}"))}
        for number, path in cards[root]:
            if number in numbers | own:
                _update(workspace, root, path, files)


def _update(workspace: Workspace, root: str, path: str, files: dict[str, Rewritten]) -> None:
    try:
        card = Card.model_validate_json(workspace.read_bytes(path))
    except (ValidationError, WorkspaceError):  # cut off, or removed since it was listed
        return
    changed = {p: f for p, f in files.items() if p in card.files and card.files[p].sha256 != f.entry.sha256}
    if not changed:
        return
    tables = {p for p in card.files if not p.startswith("dead/")}
    dead = sum(file.rows for p, file in changed.items() if p.startswith("dead/"))
    # Of several tables, the users' is the one that rows are counted by.
    out = sum(f.rows for p, f in changed.items() if p in tables and (len(tables) == 1 or p.startswith("users/")))
    update = {
        "files": card.files | {p: file.entry for p, file in changed.items()},
        "rows_in": max(0, card.rows_in - out - dead),
        "rows_out": max(0, card.rows_out - out),
        "rows_dead": max(0, card.rows_dead - dead),
    }
    Artifact(workspace, root).finish(card.model_copy(update=update))
