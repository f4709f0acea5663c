"""MovieLens' label rule, and all samples of a workspace of benchmark size in one table."""

import pyarrow as pa

from owlrec.sources.outcomes import Labels, with_outcomes
from owlrec.sources.splits import read_samples
from owlrec.workspace import Workspace

RATED = Labels(rule="rating_above", rating_above=3)


def labeled(interactions: pa.Table) -> pa.Table:
    """Rated interactions as `prepare` writes them (schema.INTERACTIONS, in another order)."""
    return with_outcomes(interactions, RATED, "interactions")


def all_samples(workspace: Workspace) -> pa.Table:
    """schema.SAMPLES, in the order of the shards."""
    return pa.concat_tables([read_samples(workspace, number) for number in workspace.table_shards("samples")])
