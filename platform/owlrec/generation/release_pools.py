"""The retrieval pools of a release: its texts as token sequences, one pool per kind and one per cohort, for the next
run's drafts.

A text is tokenized again, after the tokens that open an answer in the model's chat template, as the engine will see
them. Pools are named after the release but stored outside its folder, since they serve the generation of
the next release, not readers of this one; losing them costs speed and no text.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.schema import newest
from owlrec.workspace import Workspace
from owlrec_decoding.options import pools_identity

FOLDER = "pools"  # in a workspace; contains one folder per release


class _Newest:
    """Texts of one pool, reduced to the newest whenever they exceed twice the limit."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.tokens = max_tokens, 0
        self._rows: list[tuple[int, int, np.ndarray]] = []  # as_of, id, tokens

    def add(self, as_of: int, id_: int, tokens: np.ndarray) -> None:
        self._rows.append((as_of, id_, tokens))
        self.tokens += len(tokens)
        if self.tokens > 2 * self.max_tokens:
            rows, self._rows, self.tokens = self.rows(), [], 0
            while self.tokens + len(rows[-1][2]) <= self.max_tokens:
                self._rows.append(rows.pop())
                self.tokens += len(self._rows[-1][2])

    def rows(self) -> list[tuple[int, int, np.ndarray]]:
        """Oldest first."""
        return sorted(self._rows, key=lambda row: row[:2])


def write_release_pools(
    root: Path,
    knowledge: Iterable[pa.Table],
    tokenizer: Any,
    *,
    identity: str,
    max_tokens: int,
    cohorts_of: Callable[[str, Sequence[int]], Sequence[Sequence[str]]] | None = None,
) -> dict[str, int]:
    """Writes one pool per kind under `root`, and one per cohort if cohorts are given; returns tokens by pool.

    knowledge: tables of schema.KNOWLEDGE, each read once. Texts with relaxed tokens are left out, so that a pool does
    not reinforce its own suggestions. max_tokens: per pool; the newest texts (by as_of) stay. cohorts_of: returns the
    names of the cohorts of each id of a kind.
    """
    from owlrec_decoding.pools import answer_tokens, write_pool  # here, since importing numba takes a second

    pools: dict[str, _Newest] = {}
    for table in knowledge:
        usable = [r for r in newest(table).to_pylist() if r["text"] and not r["relaxed"]]
        texts, ended = [r["text"] for r in usable], [r["finish_reason"] == "stop" for r in usable]
        names = [[row["kind"]] for row in usable]
        if cohorts_of is not None:
            for kind in {row["kind"] for row in usable}:
                at = [i for i, row in enumerate(usable) if row["kind"] == kind]
                for i, cohorts in zip(at, cohorts_of(kind, [usable[i]["id"] for i in at]), strict=True):
                    names[i] += cohorts
        tokenized = answer_tokens(tokenizer, texts, ended) if usable else ()
        for row, pools_of_row, tokens in zip(usable, names, tokenized, strict=True):
            for name in pools_of_row:
                pools.setdefault(name, _Newest(max_tokens)).add(row["as_of"], row["id"], tokens)
    written = {}
    for name, texts_of_pool in pools.items():
        rows = texts_of_pool.rows()
        sequences, ids = [r[2] for r in rows], [r[1] for r in rows]
        pool = write_pool(root, name, sequences, ids, identity=identity, max_tokens=max_tokens)
        written[name] = len(pool.tokens)
    return written


def find_pools(workspace: Workspace, release: str, identity: str) -> tuple[str | None, str]:
    """Folder of a release's pools, if an engine of `identity` can draft from them, with a message.

    Pools of another model are skipped, not refused: a recipe's model may change from one release to the next.
    """
    if not workspace.local or not workspace.exists(FOLDER, release):
        return None, f"release {release} has no retrieval pools in this workspace: no drafts from it"
    root = workspace.local_path(FOLDER, release)
    if (theirs := pools_identity(root)) != identity:
        return (
            None,
            f"the pools of release {release} have tokens of {theirs}, not of {identity}: no drafts from it",
        )
    return str(root), f"drafting from the texts of release {release}"
