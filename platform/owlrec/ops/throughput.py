"""How fast a generation job ran, over time and by replica, and what the quality gate saw: read off its cards."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel

from owlrec.shards import Card

_SLICES = 12


class Throughput(BaseModel):
    """Figures of a whole job, over all runs that it took."""

    over_time: dict[str, float] = {}  # output tokens/s by slice of time, "0 to 5 min" and so on
    by_replica: dict[str, float] = {}  # output tokens/s between a replica's first shard and its last
    texts_by_flag: dict[str, int] = {}
    actions: dict[str, int] = {}


def throughput(cards: Iterable[Card]) -> Throughput:
    """A shard's tokens are spread evenly over the time that it took."""
    flags: Counter[str] = Counter()
    actions: Counter[str] = Counter()
    spans, engines = [], []
    for card in cards:
        counts = {name: n for name, n in card.counts.items() if isinstance(n, int)}
        flags.update({name.removeprefix("flag_"): n for name, n in counts.items() if name.startswith("flag_")})
        actions.update({name.removeprefix("quality_"): n for name, n in counts.items() if name.startswith("quality_")})
        if (written := counts.get("output_tokens", 0)) and card.seconds:
            spans.append((card.finished - card.seconds, card.finished, written))
            engines.append(card.worker)
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
