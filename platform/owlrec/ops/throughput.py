"""How fast a generation job ran, over time and by replica, and what the quality gate saw: read off its manifests."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel

from owlrec.generation.shards import ShardManifest

_SLICES = 12


class Throughput(BaseModel):
    """Figures of a whole job, over all runs that it took."""

    over_time: dict[str, float] = {}  # output tokens/s by slice of time, "0 to 5 min" and so on
    by_replica: dict[str, float] = {}  # output tokens/s between a replica's first shard and its last
    texts_by_flag: dict[str, int] = {}
    actions: dict[str, int] = {}


def throughput(manifests: Iterable[ShardManifest]) -> Throughput:
    """A shard's tokens are spread evenly over the time that it took."""
    flags: Counter[str] = Counter()
    actions: Counter[str] = Counter()
    spans, engines = [], []
    for manifest in manifests:
        flags.update(manifest.flags)
        actions.update(manifest.actions)
        if manifest.output_tokens and manifest.seconds:
            spans.append((manifest.finished - manifest.seconds, manifest.finished, manifest.output_tokens))
            engines.append(manifest.engine)
    if not spans:
        return Throughput(texts_by_flag=dict(flags), actions=dict(actions))
    start, end, tokens = np.array(spans).T
    edges = np.linspace(start.min(), end.max(), _SLICES + 1)
    overlap = np.minimum(end[:, None], edges[1:]) - np.maximum(start[:, None], edges[:-1])
    speed = (np.clip(overlap, 0, None) / (end - start)[:, None] * tokens[:, None]).sum(axis=0) / np.diff(edges)
    minutes = (edges - edges[0]) / 60
    names = np.array(engines)
    of = {name: names == name for name in dict.fromkeys(engines)}
    return Throughput(
        over_time={f"{a:.1f} to {b:.1f} min": float(s) for a, b, s in zip(minutes, minutes[1:], speed, strict=False)},
        by_replica={n: float(tokens[mine].sum() / (end[mine].max() - start[mine].min())) for n, mine in of.items()},
        texts_by_flag=dict(flags),
        actions=dict(actions),
    )
