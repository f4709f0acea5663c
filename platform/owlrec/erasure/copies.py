"""Copies of erased files in the caches of nodes.

An erasure cannot reach another machine's disk. It leaves the hashed names of the files that it replaced or removed, and
each server's process evicts what its own node has of them, as soon as nobody has it open.
"""

from collections.abc import Iterable

from owlrec.node_cache import NodeCache
from owlrec.tombstones import FOLDER
from owlrec.workspace import Workspace

_FILE = "copies.json"


def write_copies(workspace: Workspace, run: str, paths: Iterable[str]) -> None:
    """Says which files' copies must go. run: the folder of the erasure."""
    workspace.write_json(f"{run}/{_FILE}", sorted({workspace.copy_name(path) for path in paths}))


class ErasedCopies:
    """What a node has still to evict of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._done = workspace, set[str]()

    def evict(self) -> int:
        """Removes the copies of erasures that it has not been through yet; how many stay, since they are open."""
        workspace, left = self._workspace, 0
        if workspace.local:
            return 0
        for run in set(workspace.names(FOLDER)) - {"key"} - self._done:
            path = f"{FOLDER}/{run}/{_FILE}"
            if workspace.entry(path) is None:
                continue
            held = NodeCache.default().evict(set(workspace.read_json(path)))[1]
            left += held
            if not held:
                self._done.add(run)
        return left
