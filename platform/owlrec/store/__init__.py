"""Releases of knowledge: `publish` one, in full or as a delta, `open_release` and ask its store, `roll_back` to the one
before, `compact` a chain of deltas, `prune` what is old.
"""

from owlrec.store.compaction import compact, prune
from owlrec.store.interface import Knowledge, KnowledgeStore
from owlrec.store.latency import measure_lookup
from owlrec.store.manifest import ReleaseManifest
from owlrec.store.publishing import ReleaseInfo, publish
from owlrec.store.release import Release, current_release, list_releases, open_release, roll_back

__all__ = [
    "Knowledge",
    "KnowledgeStore",
    "Release",
    "ReleaseInfo",
    "ReleaseManifest",
    "compact",
    "current_release",
    "list_releases",
    "measure_lookup",
    "open_release",
    "prune",
    "publish",
    "roll_back",
]
