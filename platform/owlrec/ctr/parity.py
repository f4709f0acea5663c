"""Whether an artifact scores as the trainer did: the trainer's own test scores, asked for again one request at a time.

Each row becomes a request of its user, who brings the history that the sample had. Everything between the two is
thereby compared: the encoding of features, the fields of knowledge, the model's one-user path, the program.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.ctr.batches import Tables
from owlrec.ctr.experiment import Trial
from owlrec.ctr.live import LiveState, TableKnowledge
from owlrec.ctr.scores import read_grid_scores
from owlrec.ctr.scoring import Scorer, User
from owlrec.errors import WorkspaceError
from owlrec.sources.splits import read_samples
from owlrec.workspace import Workspace

TOLERANCE = 1e-5  # in probability; float32 sums in another order differ by some 1e-7


def largest_difference(
    scorer: Scorer, tables: Tables | None, workspace: Workspace, grid: str, trial: Trial, *, rows: int = 200
) -> float:
    """Over `rows` test samples, evenly spaced over the first shards: the largest difference in probability from what
    the trial scored.

    tables: that the trial read. Raises WorkspaceError where the trial left no test scores, or of other
    samples than the workspace has.
    """
    scored = read_grid_scores(workspace, grid, [trial])
    shards, n = [], 0
    for number in workspace.table_shards("samples"):
        samples = read_samples(workspace, number)
        shards.append(samples.filter(pc.equal(samples["split"], "test")))
        n += len(shards[-1])
        if n >= rows:
            break
    samples = pa.concat_tables(shards)
    read_all = len(shards) == len(workspace.table_shards("samples"))
    if (
        scored is None
        or not np.array_equal(scored.user_ids[:n], samples["user_id"].to_numpy())
        or (read_all and n != len(scored.user_ids))
    ):
        raise WorkspaceError(
            f"{workspace.root}: the test scores of {trial.path} are missing, or of other samples than `prepare` wrote "
            f"last. Run `train_ctr` again."
        )
    chosen = np.unique(np.linspace(0, n - 1, rows).astype(np.int64))
    ours = []
    for row in samples.take(chosen).to_pylist():
        # A sample reads what was known before it, each in a state of its own.
        known = TableKnowledge(tables, row["timestamp"]) if tables else None
        ours.append(scorer.score(User.of_sample(row), [row["item_id"]], LiveState(scorer.model, known))[0])
    return float(np.abs(np.array(ours) - scored.scores[trial.path][chosen]).max())
