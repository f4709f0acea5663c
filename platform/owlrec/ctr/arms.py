"""The arms of an experiment: what each reads of users and items, in which form, and what it is compared with.

An arm's name is what it reads ("knowledge"), followed by nothing where it reads vectors, by "-codes" where it reads
their semantic ids alone, and by "+codes" where it reads both. Vectors of cohorts and of interest partitions have no
semantic ids.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from owlrec.errors import RecipeError

Arm = Literal[
    "none",
    "knowledge",
    "knowledge-codes",
    "knowledge+codes",
    "collective",
    "both",
    "streaming",
    "shuffled",
    "shuffled-codes",
    "shuffled+codes",
    "metadata",
    "metadata-codes",
    "metadata+codes",
]
Form = Literal["vectors", "codes", "both"]
DISLIKED = "disliked"  # of a user's cohort by what they disliked, beside "collective" of what they liked
STREAMING = "streaming"  # the source in which refreshes keep a vector of each partition of a user's interests
# Of a user's texts, before the newest one in the slot of "knowledge" (LIBER, arXiv 2411.14713); the newest first.
OLDER_PARTITIONS = ("partition-1", "partition-2", "partition-3")


def arm_parts(arm: Arm) -> tuple[str, Form]:
    """What an arm reads (an arm without a form), and in which form."""
    forms: dict[str, Form] = {"-codes": "codes", "+codes": "both"}
    for suffix, form in forms.items():
        if arm.endswith(suffix):
            return arm.removesuffix(suffix), form
    return arm, "vectors"


@dataclass(frozen=True)
class ArmSources:
    """The sources of the vectors that an arm reads, a side; their order is that of the adaptor's slots."""

    user: tuple[str, ...] = ()
    item: tuple[str, ...] = ()


def arm_sources(arm: Arm, given: Mapping[str, Collection[str]]) -> ArmSources:
    """Which of the vectors that were given an arm reads.

    `collective` reads the knowledge of cohorts, of users by what they liked and, where that was given, by what they
    disliked; `both` that and the individual knowledge; `streaming` the newest texts of a user, those of partitions
    that refreshes have read among them. `shuffled` reads individual knowledge, or collective knowledge where there is
    no other.
    given: source -> the sides ("user", "item") of which it has vectors.
    Raises RecipeError where a source that the arm needs was not given.
    """
    needed: tuple[str, ...]
    reads, _ = arm_parts(arm)
    match reads:
        case "none":
            needed = ()
        case "both":
            needed = ("knowledge", "collective")
        case "streaming":
            needed = ("knowledge",)
        case "shuffled":
            needed = ("collective",) if "knowledge" not in given and "collective" in given else ("knowledge",)
        case _:
            needed = (reads,)
    for source in needed:
        missing = [f"{side}s" for side in ("user", "item") if side not in given.get(source, ())]
        if missing:
            raise RecipeError(
                f"ctr.arms: arm '{arm}' needs {source} vectors. `encode` wrote none of {' and '.join(missing)}: "
                f"run it with a recipe that yields them, or leave the arm out."
            )
    further: tuple[str, ...] = (DISLIKED,) if "collective" in needed and "user" in given.get(DISLIKED, ()) else ()
    if reads == "streaming":
        if "user" not in given.get(STREAMING, ()):
            raise RecipeError(
                "ctr.arms: arm 'streaming' needs the interest partitions of users, but no refresh has read any with "
                "this encoder. Run `owlrec refresh` first, or leave the arm out: without partitions it would be "
                "`knowledge`."
            )
        further = OLDER_PARTITIONS
    return ArmSources(user=needed + further, item=needed)


def stored_sources(sources: ArmSources) -> set[str]:
    """The sources that hold what an arm reads: partitions stand in one."""
    return {STREAMING if source in OLDER_PARTITIONS else source for source in (*sources.user, *sources.item)}


def bases(arm: Arm) -> tuple[Arm, ...]:
    """What an arm is compared with: no knowledge, as many parameters reading the wrong ids' knowledge, and, where it
    reads semantic ids, the vectors alone.
    """
    reads, form = arm_parts(arm)
    shuffled: dict[Form, Arm] = {"vectors": "shuffled", "codes": "shuffled-codes", "both": "shuffled+codes"}
    found: list[Arm] = ["none", shuffled[form], *([] if form == "vectors" else [cast(Arm, reads)])]
    return tuple(base for base in found if arm not in ("none", base))
