"""Releases of knowledge: `publish` one, in full or as a delta; `open_release` and query its store; `roll_back` to the
previous one; `compact` a chain of deltas; `prune` old ones.
"""

from owlrec.releases.build import ReleaseInfo, ShardRows, publish, publish_rows
from owlrec.releases.manifest import ReleaseManifest, list_releases
from owlrec.releases.release import Release, current_release, open_release, roll_back
from owlrec.releases.retention import compact, prune
from owlrec.releases.rows import Knowledge, KnowledgeStore, measure_lookup

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
