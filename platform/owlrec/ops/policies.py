"""Three ways to know users and to keep what is known fresh, as numbers of calls of the LLM.

individual: a text for every user and item; who has acted since is asked about anew, with the whole prompt (a prompt
that stays the same keeps its text, see generation/worker.py). collective: a text for every cohort (REKI), again
where its members have changed. streaming: texts for every user and item at first, then a rewrite from the new
behaviours of those whose interests have moved (LIBER).
"""

from typing import Literal, get_args

from pydantic import Field

from owlrec.config import Config
from owlrec.errors import RecipeError
from owlrec.ops.planning import Runs
from owlrec.ops.workload import Call, WorkloadFigures

Policy = Literal["individual", "collective", "streaming"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class Horizon(Config):
    """What is planned for: a first full run, and refreshes after it."""

    users: int = Field(0, ge=0)
    items: int = Field(0, ge=0)
    refreshes: int = Field(0, ge=0)
    acting_share: float | None = Field(None, ge=0, le=1)  # of the users, between two refreshes; None = as measured
    calls_per_acting: float | None = Field(None, ge=0, le=1)  # streaming asks about; None = as measured
    cohorts: int | None = Field(None, ge=1)  # None = in proportion to users and items, as in the measured run
    renewed_share: float = Field(1.0, ge=0, le=1)  # of the cohorts, asked about again at a refresh: at worst all

    def acting(self, workload: WorkloadFigures) -> int:
        """Users who act between two refreshes. Raises RecipeError where nobody says how many."""
        share = self.acting_share if self.acting_share is not None else workload.acting_share
        if share is None:
            raise RecipeError(
                "what share of the users acts between two refreshes? Say it (--acting-share 0.02), or run `owlrec "
                "refresh` once on the measured run."
            )
        return round(share * self.users)


def runs_of(policy: Policy, horizon: Horizon, workload: WorkloadFigures) -> Runs:
    """Calls of each sort, of the full run and of each refresh.

    Raises RecipeError where the measured run lacks what the policy needs.
    """
    if policy == "collective":
        cohorts = _cohorts(horizon, workload)
        return Runs({"cohort": cohorts}, {"cohort": round(cohorts * horizon.renewed_share)}, horizon.refreshes)
    full: dict[Call, int] = {"user": horizon.users, "item": horizon.items}
    if not horizon.refreshes:
        return Runs(full)
    acting = horizon.acting(workload)
    if policy == "individual":
        return Runs(full, {"user": acting}, horizon.refreshes)
    asked = horizon.calls_per_acting if horizon.calls_per_acting is not None else workload.calls_per_acting
    if asked is None or "refresh" not in workload.kinds:
        raise RecipeError(
            "streaming: the measured run was never refreshed. Run `owlrec refresh` on it once, with some new events."
        )
    return Runs(full, {"refresh": round(acting * asked)}, horizon.refreshes)


def stored_of(policy: Policy, horizon: Horizon, workload: WorkloadFigures) -> tuple[dict[Call, int], int]:
    """Texts that are kept once all is compacted, by sort, and ids that are known by their cohorts alone."""
    if policy == "collective":
        return {"cohort": _cohorts(horizon, workload)}, horizon.users + horizon.items
    return {"user": horizon.users, "item": horizon.items}, 0


def _cohorts(horizon: Horizon, workload: WorkloadFigures) -> int:
    shares = {"users": workload.cohorts_per_user, "items": workload.cohorts_per_item}
    if "cohort" not in workload.kinds or (horizon.cohorts is None and None in shares.values()):
        raise RecipeError(
            "collective: the measured run asked about no cohorts. Add `cohorts: {}` and `prompts: {mode: both}` to its "
            "recipe and run it again."
        )
    if horizon.cohorts is not None:
        return horizon.cohorts
    return round(horizon.users * (shares["users"] or 0)) + round(horizon.items * (shares["items"] or 0))
