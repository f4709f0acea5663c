"""How long a lookup takes: single gets of random ids, the way an online request asks for them."""

import time

import numpy as np

from owlrec.releases.release import Release


def measure_lookup(release: Release, kind: str, ids: np.ndarray, *, n: int = 2000, seed: int = 0) -> dict[str, float]:
    """Times `n` single lookups each of knowledge and vectors, for ids drawn from `ids` and read once before.

    Returns {"n", "knowledge_p50_us", "knowledge_p99_us", "vector_p50_us", "vector_p99_us"} (microseconds); n is 0 where
    ids is empty.
    """
    if len(ids) == 0:
        return {"n": 0.0}
    drawn = np.random.default_rng(seed).choice(np.asarray(ids, dtype=np.int64), size=n)
    release.store.get(kind, drawn)
    release.store.vectors(kind, drawn)
    found: dict[str, float] = {"n": float(n)}
    for name, lookup in (("knowledge", release.store.get), ("vector", release.store.vectors)):
        micros = np.empty(n)
        for row in range(n):
            one = drawn[row : row + 1]
            start = time.perf_counter_ns()
            lookup(kind, one)
            micros[row] = (time.perf_counter_ns() - start) / 1000
        found[f"{name}_p50_us"] = round(float(np.percentile(micros, 50)), 1)
        found[f"{name}_p99_us"] = round(float(np.percentile(micros, 99)), 1)
    return found
