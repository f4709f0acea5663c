"""What a stream of refreshes would let grow without end: the chain that a lookup walks, and releases nobody reads.

A lookup asks each delta of the chain in turn, so that a chain of dozens costs as many reads; merging it costs one pass
over all texts, and need not happen often.
"""

from pydantic import Field

from owlrec.config import Config
from owlrec.errors import OwlRecError
from owlrec.releases.manifest import chain
from owlrec.releases.release import current_release
from owlrec.releases.retention import compact, prune
from owlrec.workspace import Workspace


class TidyConfig(Config):
    """When deltas are merged, and which releases are kept after that."""

    compact_after: int | None = Field(24, ge=1)  # deltas on top of a full release; None = never by itself
    keep_releases: int = Field(3, ge=1)  # of those that were current; none younger than an hour goes


def tidy(workspace: Workspace, config: TidyConfig) -> str:
    """Merges a chain that has become too long and removes old releases; says what it did, "" for nothing.

    A release that became current meanwhile is left alone: the next refresh tidies up.
    """
    current = current_release(workspace)
    if config.compact_after is None or current is None or len(chain(workspace, current)) <= config.compact_after:
        return ""
    try:
        name, removed = compact(workspace).name, prune(workspace, config.keep_releases)
    except OwlRecError as error:  # a full disk or a HOLD does not undo the refresh
        return f"not tidied: {error}"
    return f"deltas merged into release {name}; {len(removed)} old releases removed"
