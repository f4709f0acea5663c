"""A small release to serve: vectors of two components, a user whom only a cohort knows, one who is known to nobody."""

import pyarrow as pa
from release_rows import Rows, publish_rows, tables

from owlrec.releases.build import ReleaseInfo, publish
from owlrec.serving.guard import Stopping, never_stopping
from owlrec.serving.keys import KeyRing
from owlrec.serving.knowledge_api import KnowledgeConfig, build_knowledge_api
from owlrec.serving.served import PINNED_S, ServedReleases, WorkspaceReleases
from owlrec.sources.splits import SplitConfig, for_histories, last_behaviors
from owlrec.workspace import Workspace

SCRIPT = '<script>alert(1)</script> \u2028 it\'s "war" ☃'


def world(label: str) -> Rows:
    """Every text names the release it belongs to."""
    return Rows(
        texts={
            ("user", 1): (1000, f"{label} likes films", "ok"),
            ("user", 2): (2000, SCRIPT, "short"),
            ("item", 7): (0, f"{label} a film", "ok"),
            ("cohort", 8): (3000, f"{label} war films", "ok"),
        },
        vectors={
            ("user", 1): [[1, 0]],
            ("user", 2): [[0, 2]],
            ("user", 3): [[3, 1]],
            ("item", 7): [[0.1, -2]],
            ("cohort", 8): [[3, 4]],
        },
        cohorts={("user", 5): (8,)},
    )


def publish_world(workspace: Workspace, label: str) -> str:
    """Publishes `world(label)`, current from then on; its name."""
    return publish_rows(workspace, label, world(label)).name


def served_behaviors(workspace: Workspace, interactions: pa.Table, split: SplitConfig) -> ServedReleases:
    """A release, open, that holds users' last behaviors, and beside them one text."""
    behaviors = last_behaviors(for_histories(interactions, split), split.history_length)
    info = ReleaseInfo(fingerprint="f" * 64, model="m", encoder="e", history_length=split.history_length)
    rows = tables(Rows(texts={("item", 10): (0, "a film", "ok")}))
    publish(workspace, **rows | {"behaviors": [behaviors]}, info=info)
    served = ServedReleases(WorkspaceReleases(workspace))
    assert served.refresh()
    return served


def knowledge_app(workspace: Workspace, keys: KeyRing | None = None, stopping: Stopping = never_stopping, **config):
    """The application, and the releases it serves."""
    served = ServedReleases(WorkspaceReleases(workspace, similar=True), pinned_s=PINNED_S)
    audit = config.pop("audit", None)
    api = build_knowledge_api(served, keys or KeyRing(), KnowledgeConfig(**config), stopping=stopping, audit=audit)
    return api, served
