"""Reading what a Ray Data job returns, and running a function over the parts of a table."""

import json
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
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


def map_parts(
    work: Callable[[str], Row],
    parts: Sequence[str],
    *,
    on_part: Callable[[str], None] = lambda part: None,
) -> dict[str, Row]:
    """Calls `work` with each part's name, on as many cores as the cluster has; what it returned, by part.

    work: returns what JSON can hold, and little of it: results meet in the driver. Ray must be initialised.
    """
    import ray

    if not parts:
        return {}
    dataset = ray.data.from_items([{"part": p} for p in parts], override_num_blocks=len(parts)).map_batches(
        _Worker,
        fn_constructor_args=(work,),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=len(parts)),
        num_cpus=1,
    )
    found = {}
    with closing(dataset_rows(dataset)) as rows:
        for row in rows:
            found[row["part"]] = json.loads(row["result"])
            on_part(row["part"])
    return found


class _Worker:
    def __init__(self, work: Callable[[str], Row]) -> None:
        self._work = work

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        parts = [str(part) for part in batch["part"]]
        return {"part": parts, "result": [json.dumps(self._work(part)) for part in parts]}
