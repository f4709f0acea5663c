"""What is told of each finished shard while a generation job runs: the progress bar moves, and a log gets a line of
JSON, which `tail -f` shows of a batch that runs for days.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from owlrec.generation.shards import ShardManifest
from owlrec.ops.console import Advance

_FIELDS = ("rows_in", "rows_out", "rows_dead", "prompt_tokens", "output_tokens", "accepted", "seconds", "engine")


class ShardWatch:
    """Call it with each manifest. Losing the log loses nothing: the manifests hold the same figures."""

    def __init__(
        self,
        advance: Advance,
        log: Path,
        rows: Mapping[tuple[str, str], int],
        before: Mapping[tuple[str, str], ShardManifest],
    ) -> None:
        """rows: how many rows each shard's work is, by name. before: manifests of shards that are done once more."""
        self._advance, self._log, self._rows, self._before = advance, log, rows, dict(before)

    def __call__(self, manifest: ShardManifest) -> None:
        before = self._before.get(manifest.shard.name)
        tokens = manifest.output_tokens - (before.output_tokens if before else 0)
        # Each accepted draft token saved a step of its row, so that a row took as many steps as it has other tokens.
        steps = tokens - manifest.accepted + (before.accepted if before else 0)
        self._advance(self._rows[manifest.shard.name], tokens=tokens, steps=steps, dead=manifest.rows_dead)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(manifest.finished)),
            "kind": manifest.shard.kind,
            "part": manifest.shard.part,
            **{name: getattr(manifest, name) for name in _FIELDS},
            "flags": manifest.flags,
            "actions": manifest.actions,
        }
        with suppress(OSError), self._log.open("a", encoding="utf-8") as file:  # a full disk ends the job elsewhere
            file.write(json.dumps(line) + "\n")
