"""Releases of knowledge: `publish` one, in full or as a delta, `open_release` and ask its store, `roll_back` to the one
before, `compact` a chain of deltas, `prune` what is old.
"""

from owlrec.releases.build import ReleaseInfo, ShardRows, publish, publish_rows
from owlrec.releases.format import Knowledge, KnowledgeStore, ReleaseManifest, list_releases, measure_lookup
from owlrec.releases.release import Release, current_release, open_release, roll_back
from owlrec.releases.retention import compact, prune

__all__ = [
    "Knowledge",
    "KnowledgeStore",
    "Release",
    "ReleaseInfo",
    "ReleaseManifest",
    "ShardRows",
    "compact",
    "current_release",
    "list_releases",
    "measure_lookup",
    "open_release",
    "prune",
    "publish",
    "publish_rows",
    "roll_back",
]
