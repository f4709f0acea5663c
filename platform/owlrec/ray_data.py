"""Reading what a Ray Data job returns."""

import sys
import threading
from collections.abc import Generator
from typing import Any

Row = dict[str, Any]


def on_ray() -> bool:
    """Whether this process belongs to a Ray cluster."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def dataset_rows(dataset: Any) -> Generator[Row, None, None]:
    """The rows of a data set, as its blocks are finished. Close it before Ray is shut down.

    Blocks, not `iter_rows`: that reads ahead in threads which outlive its iterator, find Ray shut down after an error
    and end the whole process from native code (Ray 2.60), so that the error's message is lost.
    """
    import ray  # here, since recipes load modules that import this one, and Ray takes a second
    from ray.data.block import BlockAccessor

    bundles = dataset.iter_internal_ref_bundles()
    try:
        for block in (ray.get(ref) for bundle in bundles for ref in bundle.block_refs):
            yield from BlockAccessor.for_block(block).iter_rows(public_row_format=True)
    finally:
        del bundles
        # Ray 2.60 itself gives its scheduling thread two seconds (streaming_executor.py:338).
        for thread in threading.enumerate():
            if thread.name.startswith("StreamingExecutor-"):
                thread.join(timeout=60)
