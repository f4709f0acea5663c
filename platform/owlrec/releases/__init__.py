"""Releases of knowledge: `publish` one, in full or as a delta, `open_release` and ask its store, `roll_back` to the one
before, `compact` a chain of deltas, `prune` what is old.
"""

from owlrec.releases.compaction import compact, prune
from owlrec.releases.interface import Knowledge, KnowledgeStore
from owlrec.releases.latency import measure_lookup
from owlrec.releases.manifest import ReleaseManifest
from owlrec.releases.publishing import ReleaseInfo, publish
from owlrec.releases.release import Release, current_release, list_releases, open_release, roll_back

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
