"""Earlier texts that a shard's rows are drafted from: each row's own, its cohorts', and a sample of its kind.

They are read when a worker claims the shard, from the current release, and handed to the engine, which keeps them in
memory until the shard is done. So drafts work on any storage and from the first row of a run, and no step of the engine
reads a file. Losing them costs speed and no text.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import numpy as np

from owlrec.errors import OwlRecError
from owlrec.generation.engines import Engine
from owlrec.generation.job import EarlierTexts
from owlrec.ids import Kind
from owlrec.releases.release import Release, current_release, open_release, read_part_ids
from owlrec.workspace import Workspace

SAMPLE = 4096  # texts of a kind: 600,000 tokens or 16 MB of index; more than this adds little to tokens per step
_MOST_COHORTS = 2  # of a row: each is one more search per step
_log = logging.getLogger(__name__)


class ReleasedTexts(EarlierTexts):
    """Texts of the current release, for the shards of one engine."""

    def __init__(self, workspace: Workspace, no_relaxed: bool = False) -> None:
        """no_relaxed: leave out texts with relaxed tokens: drafted again, they would be relaxed again."""
        self._workspace, self._no_relaxed = workspace, no_relaxed
        self._release: Release | None = None
        self._opened, self._kinds = False, set[Kind]()
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def offered(
        self,
        engine: Engine,
        shard: str,
        kind: Kind,
        ids: Sequence[int],
        cohorts: Mapping[int, Sequence[str]],
        own: Mapping[int, str],
    ) -> AsyncIterator[Mapping[int, list[str]]]:
        """See EarlierTexts.offered."""
        async with self._lock:
            if kind not in self._kinds:
                await engine.open_texts({kind: await asyncio.to_thread(self._sample, kind)})
                self._kinds.add(kind)
        texts = await asyncio.to_thread(self._own, kind, ids, own)
        members: dict[str, dict[int, str]] = {}
        for id_ in texts:
            for cohort in cohorts.get(id_, ())[:_MOST_COHORTS]:
                members.setdefault(cohort, {})[id_] = texts[id_]
        cohort_pools = {f"{shard} {cohort}": its for cohort, its in members.items()}
        await engine.open_texts({shard: texts}, searchable=False)
        await engine.open_texts(cohort_pools)
        try:
            yield {
                id_: [
                    *(f"{shard} {cohort}" for cohort in cohorts.get(id_, ())[:_MOST_COHORTS] if cohort in members),
                    shard,
                    kind,
                ]
                for id_ in ids
            }
        finally:
            await engine.close_texts([shard, *cohort_pools])

    def close(self) -> None:
        """See EarlierTexts.close."""
        if self._release is not None:
            self._release.close()
            self._release = None

    def _own(self, kind: Kind, ids: Sequence[int], own: Mapping[int, str]) -> dict[int, str]:
        texts = {id_: own[id_] for id_ in ids if id_ in own}
        return texts | self._read(kind, [id_ for id_ in ids if id_ not in texts])

    def _sample(self, kind: Kind) -> dict[int, str]:
        release = self._opened_release()
        if release is None:
            return {}
        ids = np.zeros(0, np.int64)
        with suppress(OwlRecError, OSError):  # rows then draft from the rest
            ids = sample_ids(self._workspace, release, kind, SAMPLE)
        return self._read(kind, ids.tolist())

    def _read(self, kind: Kind, ids: Sequence[int]) -> dict[int, str]:
        release = self._opened_release()
        if release is None or not ids:
            return {}
        try:
            known = release.get(kind, ids)
        except (OwlRecError, OSError) as error:  # pruned in the meantime, for instance
            _log.warning("no drafts from release %s: %s", release.name, error)
            return {}
        kept = zip(ids, known, strict=True)
        return {id_: k.text for id_, k in kept if k and k.text and not (self._no_relaxed and k.relaxed)}

    def _opened_release(self) -> Release | None:
        if not self._opened:
            self._opened = True
            try:
                name = current_release(self._workspace)
                self._release = open_release(self._workspace, name, verify=False, lazily=True) if name else None
            except (OwlRecError, OSError) as error:
                _log.warning("no drafts from earlier texts: %s", error)
        return self._release


def sample_ids(workspace: Workspace, release: Release, kind: Kind, most: int) -> np.ndarray:
    """Ids of a kind with a text of their own, int64 [at most `most`]; reads as few parts of the release as it can."""
    full = release.chain[-1]  # a delta holds few texts
    ids = np.zeros(0, np.int64)
    for number in range(len(full.parts)):  # ids are spread over parts by their hash
        ids = np.append(ids, read_part_ids(workspace, full, number, kind))[:most]
        if len(ids) == most:
            break
    return ids
