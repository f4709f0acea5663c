"""Releases of knowledge: `publish` one, `open_release` and ask its store, `roll_back` to the one before."""

from owlrec.store.interface import Knowledge, KnowledgeStore
from owlrec.store.latency import measure_lookup
from owlrec.store.publishing import ReleaseInfo, publish
from owlrec.store.release import Release, ReleaseManifest, current_release, list_releases, open_release, roll_back

__all__ = [
    "Knowledge",
    "KnowledgeStore",
    "Release",
    "ReleaseInfo",
    "ReleaseManifest",
    "current_release",
    "list_releases",
    "measure_lookup",
    "open_release",
    "publish",
    "roll_back",
]
