"""The recipe's section `streaming`: where new events come from, when a user's text is renewed, how chains are kept."""

from typing import Literal

from pydantic import Field

from owlrec.config import Config

MS_PER_DAY = 86_400_000


class RefreshConfig(Config):
    """Where the log is and what of it is taken in; whose text is renewed; how long chains of deltas may grow."""

    events: str | None = None  # a folder or a file of Parquet, on any store; None = `events` in the workspace
    max_lateness_days: float = Field(3.0, ge=0)  # behind the newest event of the log; what is older is refused
    max_future_s: float = Field(300.0, ge=0)  # clocks differ by minutes; what is later comes from a broken one
    # create: a user who stands in no table gets a text of their own; an item that stands in none counts as a
    # behavior, but has neither a title to quote nor a vector.
    unknown_users: Literal["create", "refuse"] = "refuse"
    unknown_items: Literal["create", "refuse"] = "refuse"

    freeze_behaviours: int = Field(6, ge=1)  # so many unread ones are read; more than a prompt holds, by several
    freeze_days: float = Field(7.0, gt=0)  # between the oldest unread behavior and the newest event of all
    freeze_drift: float = Field(0.6, ge=0, le=2)  # cosine distance between what is unread and what was read
    freeze_min_behaviours: int = Field(3, ge=1)  # fewer are an accident, not a drift
    partitions: int = Field(4, ge=1, le=256)  # kept vectors per user, newest first; 256: what a release has room for
    # Calls about users, one per partition; None: about all that is due. Items are asked about beside them.
    budget_calls: int | None = Field(None, ge=0)

    compact_after: int | None = Field(24, ge=1)  # deltas on top of a full release; None = never by itself
    keep_releases: int = Field(3, ge=1)  # of those that were current; none younger than an hour goes

    @property
    def max_lateness_ms(self) -> int:
        """max_lateness_days in milliseconds."""
        return round(self.max_lateness_days * MS_PER_DAY)

    @property
    def freeze_ms(self) -> int:
        """freeze_days in milliseconds."""
        return round(self.freeze_days * MS_PER_DAY)
