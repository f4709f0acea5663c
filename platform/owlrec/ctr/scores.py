"""The test scores of a trial, kept beside its model so that arms can be compared row by row long after training.

Ids, labels and scores, nothing else: no texts, no histories, no profile. They are of at most `encoded.EVALUATED_ROWS`
rows, and only the vectors that a comparison is about are in memory.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from owlrec.ctr.comparison import GridScores
from owlrec.ctr.experiment import Trial, grid_folder
from owlrec.errors import WorkspaceError
from owlrec.workspace import Workspace

FILE = "test_scores.parquet"
SCHEMA = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("label", pa.float32()), ("score", pa.float64())])


@dataclass(frozen=True)
class ScoredRows:
    """One row for each sample of a split that was scored, in the order of the samples table."""

    user_ids: np.ndarray  # int64 [n]
    item_ids: np.ndarray  # int64 [n]
    labels: np.ndarray  # float32 [n]
    scores: np.ndarray  # float64 [n], probabilities

    def to_table(self) -> pa.Table:
        """As `SCHEMA`."""
        return pa.table([self.user_ids, self.item_ids, self.labels, self.scores], schema=SCHEMA)


def read_grid_scores(workspace: Workspace, fingerprint: str, trials: Iterable[Trial]) -> GridScores | None:
    """The test scores of those of `trials` that left any (older versions left none); None where none did.

    Raises WorkspaceError where two trials were not scored on the same rows.
    """
    first: pa.Table | None = None
    paths: dict[str, str] = {}
    for trial in trials:
        path = f"{grid_folder(fingerprint)}/{trial.path}/{FILE}"
        if not workspace.exists(path):
            continue
        rows = workspace.read_parquet(path, [name for name in SCHEMA.names if name != "score"])
        first = rows if first is None else first
        if not rows.equals(first):
            raise WorkspaceError(
                f"{workspace.path(path)} scores other rows ({rows.num_rows}) than the first trial of its grid does "
                f"({first.num_rows}). Delete the folder {workspace.path(grid_folder(fingerprint))} and run `train_ctr` "
                f"again."
            )
        paths[trial.path] = path
    if first is None:
        return None
    scores = _StoredScores(workspace, paths)
    return GridScores(first["user_id"].to_numpy(), first["label"].to_numpy(), scores)


class _StoredScores(Mapping[str, np.ndarray]):
    """The scores of trials by their path, read when they are asked for."""

    def __init__(self, workspace: Workspace, paths: Mapping[str, str]) -> None:
        self._workspace, self._paths = workspace, paths

    def __getitem__(self, trial: str) -> np.ndarray:
        scores: np.ndarray = self._workspace.read_parquet(self._paths[trial], ["score"])["score"].to_numpy()
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
