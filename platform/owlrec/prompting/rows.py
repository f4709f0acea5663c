"""Turns the shards of the users, histories and items tables into prompts, one a row.

The titles behind a user's history live in the `ItemCatalog`, an Arrow column behind a sorted id array: 10^7 titles
take about 0.5 GB a process there, and several times that in a Python dict.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.config import Config
from owlrec.prompting.framework import Framework, FrameworkName, item_prompt, item_system, user_prompt, user_system
from owlrec.prompting.kar import KAR
from owlrec.prompting.once import ONCE
from owlrec.prompting.rlmrec import RLMREC
from owlrec.prompting.trawl import TRAWL
from owlrec.scenario import Scenario
from owlrec.workspace import Workspace, fingerprint

FRAMEWORKS: dict[FrameworkName, Framework] = {"kar": KAR, "once": ONCE, "rlmrec": RLMREC, "trawl": TRAWL}


class PromptConfig(Config):
    """Which prompts to write. `framework` names the paper whose structure they follow."""

    framework: FrameworkName = "kar"
    history_tokens: int = (
        256  # about 20 film titles: beyond it a small model loses the thread and prefill dominates the cost
    )


@dataclass(frozen=True)
class Prompt:
    """What to ask about one user or item. `text` is "" where there is nothing to ask about."""

    kind: str
    id: int
    as_of: int  # ms; 0 for items, whose facts do not depend on anybody's history
    system: str  # the same for all rows of a kind
    text: str


class ItemCatalog:
    """Titles by item id."""

    def __init__(self, items: pa.Table) -> None:
        """items: a table with `item_id` and `title`, in any order."""
        ids = items["item_id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        self._ids = ids[order]
        self._titles = items["title"].combine_chunks().take(pa.array(order))

    @classmethod
    def load(cls, workspace: Workspace) -> "ItemCatalog":
        """Reads the workspace's items table."""
        return cls(workspace.read_table("items", ["item_id", "title"]))

    def titles(self, ids: np.ndarray) -> list[str]:
        """The title of each id, in order; "" for an unknown id or a null title.

        ids: int64 [n].
        """
        if len(self._ids) == 0:
            return [""] * len(ids)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        known = self._ids[at] == ids
        texts = self._titles.take(pa.array(at)).to_pylist()
        return [(t or "") if k else "" for t, k in zip(texts, known, strict=True)]


def template_fingerprint(config: PromptConfig, scenario: Scenario) -> str:
    """SHA-256 of all that shapes a prompt besides its row: a changed wording is another job.

    Of the families only the chosen one counts, so that a change to another leaves finished work valid.
    """
    return fingerprint(config, scenario, *astuple(FRAMEWORKS[config.framework]))


def user_prompts(
    users: pa.Table,
    histories: pa.Table,
    catalog: ItemCatalog,
    config: PromptConfig,
    scenario: Scenario,
    count_tokens: Callable[[str], int],
) -> Iterator[Prompt]:
    """The prompts for a shard of users, in the order of `histories`.

    users, histories: the same shard of both tables (see schema.py); a user without a history row gets no prompt.
    """
    family = FRAMEWORKS[config.framework]
    system = user_system(family, scenario)
    profiles = {row["user_id"]: row for row in users.to_pylist()}
    for row in histories.to_pylist():
        titles = catalog.titles(np.asarray(row["items"], dtype=np.int64))
        behaviours = [(t, r) for t, r in zip(titles, row["ratings"], strict=True) if t]
        profile = {k: v for k, v in profiles.get(row["user_id"], {}).items() if isinstance(v, str)}
        text = user_prompt(
            family,
            scenario,
            profile,
            behaviours,
            history_tokens=config.history_tokens,
            count_tokens=count_tokens,
        )
        yield Prompt("user", row["user_id"], row["as_of"], system, text)


def item_prompts(items: pa.Table, scenario: Scenario, framework: FrameworkName) -> Iterator[Prompt]:
    """The prompts for a shard of items, in its order."""
    family = FRAMEWORKS[framework]
    system = item_system(family, scenario)
    for row in items.to_pylist():
        attributes: dict[str, Any] = {k: v for k, v in row.items() if k not in ("item_id", "raw_id", "title")}
        yield Prompt("item", row["item_id"], 0, system, item_prompt(family, scenario, row["title"] or "", attributes))
