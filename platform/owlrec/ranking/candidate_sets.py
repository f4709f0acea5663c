"""The candidates among which a sample's behaviors are retrieved, so that a ranker is tuned on what it is served.

A request asks about several candidates, and behaviors are retrieved once for all of them. A sample is one candidate;
those that its request may have held besides are, first, what was logged for its user at the same moment (an impression
list, or a positive with its drawn negatives), whose history is the same to the letter, and then items drawn from the
catalog in place of what a recall stage would have added. The draw hangs on user and moment alone: samples of one moment
share their set however many are drawn, and nothing that the user did later tells what is shown.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from owlrec.ordered import rows_of, run_starts
from owlrec.schema import hash_of

SET_SIZE = 10  # as many as a cascade asks the LLM about by default
_DRAWS = 4 * SET_SIZE  # some are drawn twice, some the user has met


def with_candidates(samples: pa.Table, logged: pa.Table, catalog: np.ndarray) -> pa.Table:
    """`samples` with a column `candidates`: list<int64>, at most SET_SIZE different items, ascending, the sample's own
    among them. Shorter only where the catalog has too few items that the user has not met.

    samples: user_id, item_id, timestamp and history; logged: user_id, item_id and timestamp of at least all samples of
    these users at these moments, in any order; catalog: int64 [n], all item ids. Of a longer logged list the sample
    keeps those that come first by a hash of user, moment and item.
    """
    user, item, time = (logged[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    rank = hash_of(1, user, time, item)
    order = np.lexsort((rank, time, user))
    user, item, time = user[order], item[order], time[order]
    starts = np.flatnonzero(run_starts(user, time) == np.arange(len(user)))
    ends = np.r_[starts[1:], len(user)]
    moment = hash_of(1, user[starts], time[starts])
    by_hash = np.argsort(moment)
    keys = hash_of(1, samples["user_id"].to_numpy(), samples["timestamp"].to_numpy())
    at = by_hash[rows_of(moment[by_hash], keys)]
    histories = samples["history"].to_pylist()
    sets = [
        _candidates(own, item[starts[row] : ends[row]], history or (), catalog, key)
        for own, row, history, key in zip(samples["item_id"].to_numpy(), at, histories, keys.tolist(), strict=True)
    ]
    return samples.append_column("candidates", pa.array(sets, pa.list_(pa.int64())))


def _candidates(own: int, logged: np.ndarray, history: Sequence[int], catalog: np.ndarray, seed: int) -> np.ndarray:
    found = dict.fromkeys([int(own), *logged.tolist()])
    if len(found) < SET_SIZE:
        drawn = catalog[np.random.default_rng(seed).integers(0, len(catalog), _DRAWS)].tolist()
        met = set(history)
        found |= dict.fromkeys(other for other in drawn if other not in met)
    return np.sort(list(found)[:SET_SIZE])
