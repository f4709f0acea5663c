"""Releases of knowledge, for those who read them: `open_release` and ask its store, `roll_back` to the one before.

How they are made is in `build`, what becomes of old ones in `retention`; both need Arrow, which reading does not.
"""

from owlrec.releases.manifest import ReleaseManifest, list_releases
from owlrec.releases.release import Release, current_release, open_release, roll_back
from owlrec.releases.rows import Knowledge, KnowledgeStore, measure_lookup

__all__ = [
    "Knowledge",
    "KnowledgeStore",
    "Release",
    "ReleaseManifest",
    "current_release",
    "list_releases",
    "measure_lookup",
    "open_release",
    "roll_back",
]
