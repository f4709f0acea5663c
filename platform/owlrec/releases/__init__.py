"""Reading releases of knowledge: `open_release` and query its store; `roll_back` to the previous one.

`build` makes releases and `retention` removes old ones; both need Arrow, which reading does not.
"""

from owlrec.releases.format import Knowledge, KnowledgeStore, ReleaseManifest, list_releases, measure_lookup
from owlrec.releases.release import Release, current_release, open_release, roll_back

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
