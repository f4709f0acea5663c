"""All samples of a workspace of benchmark size, in one table."""

import pyarrow as pa

from owlrec.sources.splits import read_samples
from owlrec.workspace import Workspace


def all_samples(workspace: Workspace) -> pa.Table:
    """schema.SAMPLES, in the order of the shards."""
    return pa.concat_tables([read_samples(workspace, number) for number in workspace.table_shards("samples")])
