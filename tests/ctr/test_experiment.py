"""The grid, its settings' mistakes, and the summary by hand."""

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from owlrec.ctr.experiment import (
    ArmSummary,
    CTRConfig,
    Metrics,
    SliceMetrics,
    Trial,
    TrialResult,
    headlines,
    summarize,
    trials,
)
from owlrec.ctr.knowledge_tables import (
    OLDER_PARTITIONS,
    Arm,
    ArmSources,
    OwnArm,
    arm_parts,
    arm_sources,
    bases,
    source_slots,
    stored_sources,
)
from owlrec.errors import RecipeError
from owlrec.evaluation import GridScores, auc

BOTH = ("user", "item")
ALL = {
    "knowledge": BOTH,
    "collective": BOTH,
    "metadata": BOTH,
    "streaming": ("user",),
}


def result(arm: Arm, seed: int, auc: float, gauc: float | None = 0.6) -> TrialResult:
    metrics = Metrics(auc=auc, gauc=gauc, log_loss=0.5, calibration_error=0.1)
    numbers = {"epochs": 3, "best_epoch": 1, "seconds": 1.0, "samples_per_s": 10.0, "parameters": 5}
    return TrialResult(backbone="din", arm=arm, seed=seed, valid=metrics, test=metrics, slices={}, **numbers)


def test_grid_finishes_a_seed_before_it_starts_the_next() -> None:
    grid = trials(CTRConfig(backbones=("din",), arms=("none", "knowledge"), seeds=(4, 2)))
    assert [t.path for t in grid] == [
        "din/none/seed-4",
        "din/knowledge/seed-4",
        "din/none/seed-2",
        "din/knowledge/seed-2",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbones": ["dim"]}, "Did you mean 'din'"),
        ({"arms": ["none", "magic"]}, "no arm 'magic'. Valid names: both, collective, knowledge, metadata, none, sh"),
        ({"arms": ["none", "knowlege"]}, "no arm 'knowlege'. Did you mean 'knowledge'"),
        ({"arms": ["shuffled-none"]}, "no arm 'shuffled-none'"),
        ({"arms": ["shuffled-mine"]}, "no arm 'shuffled-mine'"),
        ({"arms": [{"mine": {}}]}, "names no source"),
        ({"arms": [{"mine": {"users": ["knowledge", "knowledge"]}}]}, "each source once"),
        ({"arms": [{"mine": {"user": ["knowledge"]}}]}, "Extra inputs"),
        ({"arms": [{"knowledge": {"users": ["knowledge"]}}]}, "'knowledge' is a short name"),
        ({"arms": [{"a-codes": {"users": ["knowledge"]}}]}, "'a-codes' cannot name an own arm"),
        ({"arms": ["none", {"mine": {"items": ["title"]}}, {"mine": {"items": ["tags"]}}]}, "mine is listed more"),
        ({"seeds": [1, 2, 1]}, "1 is listed more than once"),
        ({"seeds": []}, "at least 1"),
        ({"embed_size": 8}, "Extra inputs"),
    ],
)
def test_mistakes_in_the_recipe_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CTRConfig(**settings)


@pytest.mark.parametrize(
    ("arm", "user", "item"),
    [
        ("none", (), ()),
        ("knowledge", ("knowledge",), ("knowledge",)),
        ("collective", ("collective",), ("collective",)),
        ("both", ("knowledge", "collective"), ("knowledge", "collective")),
        ("streaming", ("knowledge", "partition-1", "partition-2", "partition-3"), ("knowledge",)),
        ("shuffled", ("knowledge",), ("knowledge",)),
        ("metadata", ("metadata",), ("metadata",)),
        ("knowledge-codes", ("knowledge",), ("knowledge",)),
        ("metadata+codes", ("metadata",), ("metadata",)),
        ("shuffled-codes", ("knowledge",), ("knowledge",)),
    ],
)
def test_what_each_arm_reads(arm: Arm, user: tuple[str, ...], item: tuple[str, ...]) -> None:
    assert arm_sources(arm, ALL) == ArmSources(user, item)


@pytest.mark.parametrize(
    ("arm", "parts", "compared"),
    [
        ("none", ("none", "vectors", False), ()),
        ("knowledge", ("knowledge", "vectors", False), ("metadata", "shuffled", "none")),
        ("mine", ("mine", "vectors", False), ("metadata", "shuffled-mine", "none")),
        ("metadata", ("metadata", "vectors", False), ("shuffled-metadata", "none")),
        ("shuffled", ("knowledge", "vectors", True), ("none",)),
        ("shuffled-mine", ("mine", "vectors", True), ("none",)),
        ("knowledge-codes", ("knowledge", "codes", False), ("metadata-codes", "shuffled-codes", "none", "knowledge")),
        ("metadata+codes", ("metadata", "both", False), ("shuffled-metadata+codes", "none", "metadata")),
        ("shuffled-codes", ("knowledge", "codes", True), ("none", "shuffled")),
    ],
)
def test_an_arm_is_compared_with_its_like_and_with_metadata_first(
    arm: Arm, parts: tuple[str, str, bool], compared: tuple[str, ...]
) -> None:
    assert arm_parts(arm) == parts
    assert bases(arm) == compared


def test_own_arms_name_their_sources_and_their_controls_read_the_same() -> None:
    items_only = {"images": {"items": ["images"]}}
    config = CTRConfig.model_validate(
        {"backbones": ["din"], "seeds": [0], "arms": ["none", items_only, "shuffled-images", "images-codes"]}
    )
    assert config.arm_names == ("none", "images", "shuffled-images", "images-codes")
    grid = {trial.arm: trial for trial in trials(config)}
    own = config.own_arms["images"]
    assert grid["none"].own is None
    for arm in ("images", "shuffled-images", "images-codes"):
        assert grid[arm].own == own
        assert arm_sources(arm, {"images": ("item",)}, own) == ArmSources((), ("images",))
    assert CTRConfig.model_validate_json(config.model_dump_json()) == config
    assert source_slots(("knowledge", *OLDER_PARTITIONS, "collective")) == (4, 1)
    both = OwnArm(users=("streaming", "collective"), items=("metadata",))
    given = {**ALL, "disliked": ("user",)}
    assert arm_sources("mine", given, both).user == ("knowledge", *OLDER_PARTITIONS, "collective", "disliked")
    with pytest.raises(RecipeError, match=r"arm 'mine' needs images vectors\. .* none of users"):
        arm_sources("mine", {"images": ("item",)}, OwnArm(users=("images",)))


def test_codes_are_weighed_against_vectors_of_the_same_seed() -> None:
    rows = summarize([result("knowledge", 0, 0.70), result("knowledge", 1, 0.9), result("knowledge-codes", 0, 0.72)])
    assert {base: d.auc for base, d in rows[1].differences.items()} == {"knowledge": pytest.approx(0.02)}
    assert rows[0].differences == {}


def test_default_grid_holds_the_four_arms_that_every_run_has_vectors_for() -> None:
    assert CTRConfig().arms == ("none", "knowledge", "shuffled", "metadata")


def test_streaming_without_partitions_is_refused_and_is_never_silently_knowledge() -> None:
    for given in ({"knowledge": BOTH}, {"knowledge": BOTH, "streaming": ("item",)}):
        with pytest.raises(RecipeError, match=r"ctr\.arms: arm 'streaming' needs .* `owlrec refresh`"):
            arm_sources("streaming", given)


def test_partitions_stand_in_one_source() -> None:
    assert stored_sources(arm_sources("streaming", ALL)) == {"knowledge", "streaming"}
    assert stored_sources(arm_sources("both", ALL)) == {"knowledge", "collective"}


def test_shuffled_reads_collective_knowledge_where_there_is_no_other() -> None:
    assert arm_sources("shuffled", {"collective": BOTH}) == ArmSources(("collective",), ("collective",))


@pytest.mark.parametrize(
    ("arm", "given", "message"),
    [
        ("both", {"knowledge": BOTH}, r"arm 'both' needs collective vectors\. `encode` wrote none of users and items"),
        ("both", {"collective": BOTH}, r"arm 'both' needs knowledge vectors\."),
        ("collective", {"collective": ("user",)}, r"arm 'collective' needs collective vectors\. .* none of items"),
        ("streaming", {"streaming": ("user",)}, r"arm 'streaming' needs knowledge vectors\."),
        ("shuffled", {"metadata": BOTH}, r"arm 'shuffled' needs knowledge vectors\."),
        ("metadata", {}, r"arm 'metadata' needs metadata vectors"),
    ],
)
def test_an_arm_without_its_source_is_refused(arm: Arm, given: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        arm_sources(arm, given)


def test_summary_by_hand() -> None:
    none, knowledge = summarize(
        [
            result("none", 0, 0.70),
            result("none", 1, 0.74),
            result("knowledge", 0, 0.71),
            result("knowledge", 1, 0.77),
            result("knowledge", 2, 0.80, gauc=None),  # its partner is not trained yet: in the mean, not in the gain
        ]
    )
    assert none.auc == pytest.approx(0.72)
    assert none.auc_std == pytest.approx(0.04 / 2**0.5)
    assert "none" not in none.differences
    assert (knowledge.seeds, knowledge.gauc) == (3, 0.6)
    assert knowledge.auc == pytest.approx(0.76)
    assert knowledge.differences["none"].auc == pytest.approx(0.02)  # of .01 and .03


def test_the_first_line_is_knowledge_minus_metadata_in_words() -> None:
    rng = np.random.default_rng(0)
    labels, users = rng.integers(0, 2, 600).astype(float), np.arange(600) // 6
    noise = {seed: rng.normal(size=600) for seed in (0, 1)}
    shown = {"knowledge": 1.0, "metadata": 0.3, "shuffled": 0.0, "none": 0.0}

    def lines(arms: tuple[str, ...], strength: dict[str, float]) -> list[str]:
        scores = {
            f"din/{a}/seed-{s}": strength[a] * labels + noise[s] + 0.05 * rng.normal(size=600)
            for a in arms
            for s in (0, 1)
        }
        results = [result(a, s, auc(labels, scores[f"din/{a}/seed-{s}"])) for a in arms for s in (0, 1)]
        return list(map(str, headlines(results, GridScores(users, labels, scores))))

    first, *others = lines(("none", "knowledge", "shuffled", "metadata"), shown)
    assert first.startswith("knowledge - metadata: gain shown. Test AUC +0.1")
    assert "(1 backbone, 2 seeds, 100 test users)" in first
    assert [line.partition(":")[0] for line in others] == ["knowledge - shuffled", "knowledge - none"]
    swapped = {**shown, "knowledge": 0.3, "metadata": 1.0}
    assert lines(("none", "knowledge", "metadata"), swapped)[0].startswith(
        "knowledge - metadata: loss shown. Test AUC -0"
    )
    same = {**shown, "metadata": 1.0}
    [first, *_] = lines(("none", "knowledge", "metadata"), same)
    assert first.startswith("knowledge - metadata: no gain shown.")
    assert "smallest difference that this test would show is 0.0" in first
    missing, to_none = lines(("none", "knowledge"), shown)
    assert "unknown: add `metadata` to ctr.arms" in missing
    assert to_none.startswith("knowledge - none: gain shown")
    assert "Add `knowledge` to ctr.arms" in lines(("none", "metadata"), shown)[0]


def test_one_seed_has_no_spread() -> None:
    rows = summarize([result("none", 0, 0.7), result("knowledge", 0, 0.71)])
    assert rows[1].differences["none"].auc == pytest.approx(0.01)
    assert rows[1].auc_std is None
    assert ArmSummary.model_validate_json(rows[1].model_dump_json()) == rows[1]


def test_arms_are_compared_with_none_and_with_shuffled_over_the_seeds_of_both() -> None:
    none, shuffled, knowledge = summarize(
        [
            result("none", 0, 0.70),
            result("none", 1, 0.72),
            result("shuffled", 1, 0.69),
            result("knowledge", 0, 0.71),
            result("knowledge", 1, 0.75),
        ]
    )
    assert none.differences == {}
    assert shuffled.differences.keys() == {"none"}
    assert shuffled.differences["none"].auc == pytest.approx(-0.03)
    to_none, to_shuffled = knowledge.differences["none"], knowledge.differences["shuffled"]
    assert (to_none.seeds, to_none.auc) == (2, pytest.approx(0.02))
    assert to_none.rela_imp == pytest.approx(0.23 / 0.21 - 1)
    assert (to_shuffled.seeds, to_shuffled.auc) == (1, pytest.approx(0.06))
    assert to_shuffled.interval is None  # no test scores
    [_, worse] = summarize([result("none", 0, 0.4), result("knowledge", 0, 0.45)])
    assert worse.differences["none"].rela_imp is None


def test_test_scores_give_a_difference_its_interval() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    noise = rng.normal(size=400)
    scores = {"din/none/seed-0": noise, "din/knowledge/seed-0": labels + noise}
    results = [result(arm, 0, auc(labels, scores[f"din/{arm}/seed-0"])) for arm in ("none", "knowledge")]
    rows = summarize(results, GridScores(np.arange(400) // 8, labels, scores))
    difference = rows[1].differences["none"]
    assert difference.interval is not None
    assert 0 < difference.interval.low < difference.auc < difference.interval.high
    results.append(result("knowledge", 1, 0.7))
    assert summarize(results, GridScores(np.arange(400) // 8, labels, scores))[1] != rows[1]
    results.append(result("none", 1, 0.7))  # the second pair left no scores: half of the seeds would speak for both
    assert summarize(results, GridScores(np.arange(400) // 8, labels, scores))[1].differences["none"].interval is None


def test_slices_and_calibration_are_means_over_seeds() -> None:
    results = [result("none", seed, 0.7) for seed in (0, 1)]
    assert summarize(results)[0].slices == {}
    for seed, slices in enumerate(results):
        slices.slices = {"cold items": SliceMetrics(rows=4, auc=0.6 + 0.1 * seed, log_loss=0.5)}
        slices.test = slices.test.model_copy(update={"calibration_error": 0.02 + 0.02 * seed})
    [row] = summarize(results)
    assert row.calibration_error == pytest.approx(0.03)
    assert row.slices["cold items"].auc == pytest.approx(0.65)
    assert ArmSummary.model_validate_json(row.model_dump_json()) == row


def test_results_survive_json() -> None:
    given = result("none", 0, 0.7, gauc=None)
    assert TrialResult.model_validate_json(given.model_dump_json()) == given
    assert given.trial == Trial(backbone="din", arm="none", seed=0)


@pytest.mark.process
def test_settings_load_without_torch_and_ray() -> None:
    code = "import sys, owlrec.ctr.experiment; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
