"""What is told of each finished shard while a stage runs: the progress bar moves, and a log gets a line of JSON, which
`tail -f` shows of a batch that runs for days.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from owlrec.ops.console import Advance
from owlrec.shards import Card


class ShardWatch:
    """Call it with each card. Losing the log loses nothing: the cards hold the same figures."""

    def __init__(self, advance: Advance, log: Path, rows: Mapping[str, int] | None = None) -> None:
        """rows: how many rows each shard's work is, by its name; those that it wrote where that is not known."""
        self._advance, self._log, self._rows = advance, log, rows or {}

    def __call__(self, card: Card) -> None:
        tokens = int(card.counts.get("output_tokens", 0))
        # Each accepted draft token saved a step of its row, so that a row took as many steps as it has other tokens.
        steps = tokens - int(card.counts.get("accepted", 0))
        self._advance(self._rows.get(card.shard, card.rows_in), tokens=tokens, steps=steps, dead=card.rows_dead)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(card.finished)),
            **card.model_dump(include={"stage", "shard", "rows_in", "rows_out", "rows_dead", "seconds", "worker"}),
            **{name: n for name, n in card.counts.items() if not isinstance(n, str)},
        }
        with suppress(OSError), self._log.open("a", encoding="utf-8") as file:  # a full disk ends the job elsewhere
            file.write(json.dumps(line) + "\n")
