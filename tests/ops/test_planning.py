"""Plans against numbers worked out by hand."""

import numpy as np
import pytest

from owlrec.decoding.controller import DecoderCounters, StepSums
from owlrec.errors import RecipeError, WorkspaceError
from owlrec.generation.job import DECODER
from owlrec.ops.cost import (
    Estimate,
    FleetConfig,
    KindFigures,
    Runs,
    Work,
    WorkloadFigures,
    engine_seconds,
    load_fleet,
    measured_workload,
    per_row,
    plan,
)
from owlrec.refresh.state import State, write_state
from owlrec.shards import Artifact, Card


def exactly(value):
    return Estimate(low=value, expected=value, high=value)


def kind_figures(output=200.0, **changes):
    figures = {
        "rows": 100,
        "shards": 4,
        "prompt_tokens": exactly(100.0),
        "output_tokens": exactly(output),
        "seconds": exactly(output / 50),
        "knowledge_bytes": exactly(1024.0),
        "vector_bytes": None,
    }
    return KindFigures(**(figures | changes))


def workload(**changes):
    figures = {"run": "knowledge/f", "finished": 0, "kinds": {"user": kind_figures()}, "tokens_per_s": exactly(50.0)}
    return WorkloadFigures(**(figures | changes))


def group(name="a", **changes):
    return {"name": name, "accelerator": "x", "gpus": 2, "price_per_gpu_hour": 3.0, "tokens_per_s": 100} | changes


def fleet(*groups, **changes):
    return FleetConfig(groups=list(groups), **changes)


def planned(*groups, users=3600, shard_rows=36, **changes):
    """3600 users of 200 tokens, 720,000 in all: 7200 s of an engine that writes 100 a second, in shards of 72 s."""
    return plan(workload(), fleet(*groups), Runs({"user": users}), Work(shard_rows, **changes))


def test_two_gpus_take_half_the_engine_time_and_wait_for_each_other():
    found = planned(group())
    assert (found.shards, found.output_tokens.expected, found.prompt_tokens.expected) == (100, 720_000, 360_000)
    waits = 72 / 2 * (1 - 1 / 2)  # one of the two is done first: by half a shard of 72 s, or not at all
    assert found.wall_hours.expected * 3600 == pytest.approx(3600 + waits)
    assert found.gpu_hours.expected == pytest.approx(2)  # and is then given back
    assert found.cost.expected == pytest.approx(6)
    assert found.wall_hours == exactly(found.wall_hours.expected)  # nothing measured varied


def test_a_single_engine_waits_for_nobody():
    assert planned(group(gpus=1)).wall_hours.expected * 3600 == pytest.approx(7200)


def test_prompts_are_read_at_their_own_speed_where_one_is_given():
    found = planned(group(gpus=1, prefill_tokens_per_s=1000))
    assert found.wall_hours.expected * 3600 == pytest.approx(7200 + 360)


def test_unequal_groups_share_the_work_by_their_speed():
    found = planned(group(gpus=1), group("b", gpus=6, gpus_per_engine=2, tokens_per_s=200))
    begun_s = (7200 - 36 - 6 * 18) / 7  # speeds 1 : 6; then all have half a shard left, of 72 and 36 s
    assert found.wall_hours.expected * 3600 == pytest.approx(begun_s + 36)  # the slow one's, rather than 36 * 5 / 6
    shares = [g.work_share for g in found.groups]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] * 7200 == pytest.approx(begun_s + 36)
    assert shares[1] * 3600 / 3 == pytest.approx(begun_s + 18)
    assert [g.engines for g in found.groups] == [1, 3]
    assert found.gpu_hours.expected * 3600 == pytest.approx(begun_s + 36 + 6 * (begun_s + 18))


def test_a_group_that_starts_too_late_gets_no_work_and_costs_nothing():
    found = planned(group(), group("late", startup_s=4000))
    assert [g.work_share for g in found.groups] == [pytest.approx(1), 0]
    assert found.groups[1].cost.expected == 0


def test_twice_the_gpus_halve_the_wall_time_and_cost_the_same():
    one, two = (planned(group(gpus=n), shard_rows=1) for n in (2, 4))
    assert two.wall_hours.expected == pytest.approx(one.wall_hours.expected / 2, rel=0.01)
    assert two.cost.expected == pytest.approx(one.cost.expected, rel=0.01)


def test_start_up_and_idleness_are_paid_by_every_gpu_and_a_machine_that_is_waited_for_is_not():
    assert planned(group(startup_s=360)).gpu_hours.expected == pytest.approx(2 + 2 * 0.1)
    assert planned(group(idle_timeout_s=720)).gpu_hours.expected == pytest.approx(2 + 2 * 0.2)
    waiting = planned(group(provision_s=360))
    assert waiting.gpu_hours.expected == pytest.approx(2)
    assert waiting.wall_hours.expected == pytest.approx(planned(group()).wall_hours.expected + 0.1)


def test_each_run_starts_anew():
    machines = fleet(group(startup_s=360), group("late", startup_s=3900))
    runs = Runs({"user": 36_000}, {"user": 360}, refreshes=3)
    found = plan(workload(), machines, runs, Work(36))
    first, each = (plan(workload(), machines, Runs(calls), Work(36)) for calls in (runs.first, runs.each))
    assert found.calls == {"user": 36_000 + 3 * 360}
    assert found.shards == first.shards + 3 * each.shards
    assert found.wall_hours.expected == pytest.approx(first.wall_hours.expected + 3 * each.wall_hours.expected)
    assert found.gpu_hours.expected == pytest.approx(first.gpu_hours.expected + 3 * each.gpu_hours.expected)
    assert first.groups[1].work_share > 0 == each.groups[1].work_share  # a refresh is over before that one has started
    assert sum(g.work_share for g in found.groups) == pytest.approx(1)
    expected = first.groups[1].work_share * 36_000 / 37_080
    assert found.groups[1].work_share == pytest.approx(expected)


def test_the_measured_start_up_holds_for_engines_as_measured_alone():
    figures, calls = workload(startup_s=50.0), {"user": 3600}

    def wall_s(**changes):
        machines = fleet(group(gpus=1, **changes))
        return plan(figures, machines, Runs(calls), Work(36)).wall_hours.expected * 3600

    assert wall_s(tokens_per_s=None) == pytest.approx(14400 + 50)
    assert wall_s(tokens_per_s=None, startup_s=7) == pytest.approx(14400 + 7)
    assert wall_s() == pytest.approx(7200)


def test_preemptions_add_work():
    found = planned(group(gpus=1, preemption_rate_per_hour=1, startup_s=36))
    lost = (36 + 36) / 3600  # a preemption an hour: half of a shard, and a start
    assert found.groups[0].repeated_share == pytest.approx(lost)
    assert found.wall_hours.expected * 3600 == pytest.approx(36 + 7200 / (1 - lost))
    assert found.groups[0].preemptions == pytest.approx(found.wall_hours.expected)
    four_at_once = planned(group(preemption_rate_per_hour=1), shards_at_once=4)
    assert four_at_once.groups[0].repeated_share == pytest.approx(4 * 36 / 3600)


def test_preemptions_faster_than_work_are_refused():
    with pytest.raises(RecipeError, match=r"group 'a': at 100 preemptions an hour .* Make shard_rows smaller"):
        planned(group(preemption_rate_per_hour=100))


def test_ranges_push_tokens_and_speed_one_way_at_once():
    uncertain = Estimate(low=100, expected=200, high=400)
    figures = workload(
        kinds={"user": kind_figures(output_tokens=uncertain, seconds=Estimate(low=0.5, expected=2, high=8))}
    )
    found = plan(figures, fleet(group(gpus=1, tokens_per_s=None)), Runs({"user": 3600}), Work(36))
    assert found.groups[0].speed_from == "measured run"
    walls = [found.wall_hours.low, found.wall_hours.expected, found.wall_hours.high]
    assert walls == pytest.approx([0.5, 2, 8])
    assert found.cost.high == pytest.approx(4 * found.cost.expected)
    assert found.groups[0].tokens_per_s.array.tolist() == [50, 100, 200]


def test_each_kind_takes_its_own_time():
    figures = workload(kinds={"user": kind_figures(seconds=exactly(2.0)), "cohort": kind_figures(seconds=exactly(5.0))})
    found = plan(figures, fleet(group(gpus=1, tokens_per_s=None)), Runs({"user": 100, "cohort": 10}), Work(50))
    assert found.wall_hours.expected * 3600 == pytest.approx(250)
    assert found.shards == 3


def test_without_the_decoder_engines_take_as_much_longer_as_it_saved():
    figures = workload(plain_factor=1.5)
    machines = fleet(group(gpus=1, tokens_per_s=None))
    times = [
        plan(figures, machines, Runs({"user": 100}), Work(50, decoder=on)).wall_hours.expected * 3600
        for on in (True, False)
    ]
    assert times == pytest.approx([400, 600])


def test_users_and_items_add_up():
    figures = workload(kinds={"user": kind_figures(), "item": kind_figures(output=50.0)})
    found = plan(figures, fleet(group()), Runs({"user": 1000, "item": 1001}), Work(100))
    assert found.output_tokens.expected == 1000 * 200 + 1001 * 50
    assert found.shards == 10 + 11


def test_storage_by_artifact_and_its_price():
    kinds = {
        "user": kind_figures(vector_bytes=768.0),
        "refresh": kind_figures(),
        "item": kind_figures(vector_bytes=768.0),
    }
    figures = workload(kinds=kinds, release_bytes=2048.0)
    machines = fleet(group(), storage_price_per_gib_month=0.5)
    million = 2**20
    calls = {"user": million, "item": million, "refresh": 3 * million}  # in the place of texts that are there
    found = plan(figures, machines, Runs(calls), Work(1024, pool_tokens=10**7))
    storage = {name: e.expected for name, e in found.storage_gib.items()}
    assert storage == pytest.approx({"knowledge": 2, "vectors": 1.5, "release": 4, "pools": 2 * 9.1e7 / 2**30})
    assert found.storage_cost_per_month.expected == pytest.approx(0.5 * sum(storage.values()))
    assert planned(group()).storage_gib.keys() == {"knowledge"}  # the rest was not measured, and is not made up
    members = plan(figures, machines, Runs({"user": million}), Work(1024), members=2**30)
    assert members.storage_gib["release"].expected == pytest.approx(2 + 40)


def test_what_is_assumed_takes_the_place_of_what_was_measured():
    def with_(**assumed):
        machines = fleet(group(gpus=1, tokens_per_s=None), assume=assumed)
        return plan(workload(), machines, Runs({"user": 100}), Work(50))

    longer = with_(prompt_tokens={"user": 7}, output_tokens={"user": 400})
    assert (longer.prompt_tokens.expected, longer.output_tokens.expected) == (700, 40_000)
    assert longer.wall_hours.expected == pytest.approx(2 * with_().wall_hours.expected)
    with pytest.raises(RecipeError, match=r"assume: tokens of a cohort, but 100 users .* Leave it out"):
        with_(output_tokens={"cohort": 3})


@pytest.mark.parametrize(("users", "items"), [(0, 0), (-1, 0), (10, 5)])
def test_rows_that_cannot_be_planned_are_refused(users, items):
    with pytest.raises(RecipeError, match=f"{users} of user.* cannot be planned .* 100 users"):
        plan(workload(), fleet(group()), Runs({"user": users, "item": items}), Work(10))


def test_the_range_is_of_two_standard_errors_of_a_ratio():
    # Ratio 15, residuals -50 and 50: their deviation 70.7 / (sqrt(2) * 10 rows) = 5, so that f = 1 + 2 * 5 / 15.
    found = per_row(np.array([100.0, 200.0]), np.array([10.0, 10.0]))
    assert found.array == pytest.approx([9, 15, 25])
    assert per_row(np.array([20.0, 40.0]), np.array([1.0, 2.0])) == exactly(20.0)
    assert per_row(np.array([100.0]), np.array([10.0])).array.tolist() == [5, 10, 20]


def test_a_curve_is_taken_at_its_best_batch_with_and_without_the_decoder():
    machine = fleet(group(tokens_per_s=None, curve=[[1, 0.01], [10, 0.05]], prefill_tokens_per_s=1000)).groups[0]

    def speed(speed_up, **changes):
        rows = {"user": 100}  # 20,000 tokens, after prompts that take 10 s
        seconds = engine_seconds(machine, workload(speed_up=speed_up), rows, Work(10, **changes))
        return (20_000 / (seconds[::-1] - 10)).tolist()

    assert speed({}) == pytest.approx([200, 200, 200])
    assert speed({1: 3.0, 16: 1.1}) == pytest.approx([200, 300, 300])
    assert speed({16: 0.5}) == pytest.approx([100, 100, 200])
    assert speed({4: 1.5}) == pytest.approx([200, 200, 200])  # 150 at one row; nothing is known of ten
    assert speed({1: 3.0}, decoder=False) == pytest.approx([200, 200, 200])


def write_run(
    workspace, *, ends=(110.0, 120.0, 125.0), seconds=(10.0, 20.0, 15.0), counts=None, folder="f", stage="generate",
    decoded="",
):  # fmt: skip
    """Two shards of 10 users and 100 and 200 tokens, then one of 5 items and 50: done 10 s, 10 s and 5 s one after
    another, though an engine had two of them in flight at a time."""
    artifact = Artifact(workspace, f"knowledge/{folder}")
    shards = [("user/00000000", 10, 100), ("user/00000001", 10, 200), ("item/00000000", 5, 50)]
    for (name, rows, tokens), end, took in zip(shards, ends, seconds, strict=False):
        sizes = {f"{name}.parquet": 40 * rows, f"dead/{name}.parquet": 1}
        files = {path: workspace.write_bytes(artifact.path(path), b"x" * n) for path, n in sizes.items()}
        counted = {"rows_asked": rows, "prompt_tokens": 30 * rows, "output_tokens": tokens}
        artifact.finish(
            Card(
                stage=stage,
                shard=name,
                fingerprint="f",
                files=files,
                rows_in=rows,
                rows_out=rows - 1,
                rows_dead=1,
                counts=counted | ({DECODER: decoded} if decoded and name == shards[0][0] else {}),
                seconds=took,
                finished=end,
            )
        )
    if folder == "f":
        finish(workspace, "generate", counts or {"shards": 3, "shards_this_run": 3}, {"knowledge": "knowledge/f"}, 40.0)


def finish(workspace, stage, counts, outputs, seconds=1.0):
    card = Card(stage=stage, fingerprint="f", seconds=seconds, finished=130, counts=counts, outputs=outputs)
    workspace.write_json(f"stages/{stage}.json", card.model_dump(mode="json"))


def test_a_run_is_measured_from_its_shards(workspace):
    write_run(workspace)
    found = measured_workload(workspace)
    user, item = found.kinds["user"], found.kinds["item"]
    assert (user.rows, user.shards, item.rows, item.shards) == (20, 2, 5, 1)
    assert user.output_tokens.array == pytest.approx([9, 15, 25])
    assert item.output_tokens.array == pytest.approx([5, 10, 20])
    assert user.prompt_tokens == exactly(30.0)
    assert user.knowledge_bytes == exactly(40.0)
    assert user.seconds == exactly(1.0)
    assert item.seconds.expected == 1.0
    assert found.tokens_per_s.expected == pytest.approx(350 / 25)
    assert found.startup_s == 10  # the stage began at 90, its first shard at 100
    assert (user.vector_bytes, found.release_bytes, found.tokens_per_step, found.speed_up) == (None, None, None, {})
    assert (found.plain_factor, found.cohorts_per_user, found.acting_share) == (1.0, None, None)
    assert found.measured.startswith("20 users and 5 items (finished ")


def test_a_pause_between_two_runs_is_nobodys_time(workspace):
    write_run(workspace, ends=(110, 120, 5000), seconds=(10, 20, 5), counts={"shards": 3, "shards_this_run": 1})
    found = measured_workload(workspace)
    assert found.tokens_per_s.expected == pytest.approx(350 / 25)
    assert found.startup_s is None


def test_refreshes_and_cohorts_are_measured_where_they_are(workspace):
    write_run(workspace)
    write_run(workspace, folder="r", ends=(210, 220), stage="refresh")
    write_run(workspace, folder="old", ends=(20, 30), stage="refresh")
    write_run(workspace, folder="other", ends=(220, 230))  # a job of another recipe
    finish(workspace, "prepare", {"users": 20, "items": 40}, {})
    finish(workspace, "cohorts", {"user_cohorts": 4, "item_cohorts": 5}, {"cohorts": "cohorts/c"})
    workspace.fix_shards({"user": 1})
    write_state(workspace, State(name="s", n_shards=1, counts={"calls": 3, "users_with_news": 5}), "")
    found = measured_workload(workspace)
    assert found.kinds["refresh"].rows == 20
    assert found.kinds["refresh"].seconds == exactly(1.0)
    assert found.kinds["user"].rows == 20
    assert (found.cohorts_per_user, found.cohorts_per_item) == (0.2, 0.125)
    assert (found.acting_share, found.calls_per_acting) == (0.25, 0.6)


def test_vectors_release_and_decoder_are_measured_where_they_are(workspace):
    counters = DecoderCounters(
        counts={"rows": 10, "tokens": 25}, by_rows={4: StepSums(steps=5, tokens=25, seconds=2, plain_s=3)}
    )
    write_run(workspace, decoded=counters.model_dump_json())
    for name, size in {
        "knowledge-user.parquet": 300,
        "knowledge-user/v.npy": 500,
        "metadata-user.parquet": 100,
    }.items():
        workspace.write_bytes(f"vectors/v/{name}", b"x" * size)
    workspace.write_bytes("vectors/v/knowledge-item.parquet", b"x" * 70)
    workspace.write_bytes("releases/r/parts/00000.lmdb", b"x" * 1000)
    finish(workspace, "encode", {"knowledge_user": 18, "knowledge_item": 7}, {"vectors": "vectors/v"})
    finish(workspace, "publish", {"knowledge_user": 18, "knowledge_item": 7}, {"release": "r"})
    found = measured_workload(workspace)
    assert (found.kinds["user"].vector_bytes, found.kinds["item"].vector_bytes) == (50, 10)
    assert found.release_bytes == 40
    assert found.tokens_per_step == 2.5
    assert found.speed_up == {4: 1.5}
    assert found.plain_factor == pytest.approx(26 / 25)  # one second of 25 was saved


def test_a_workspace_without_a_finished_run_says_what_to_do(workspace):
    with pytest.raises(WorkspaceError, match=r"no finished generation run .* Run a small recipe first"):
        measured_workload(workspace)
    finish(workspace, "generate", {}, {"knowledge": "knowledge/f"})
    with pytest.raises(WorkspaceError, match="wrote no tokens"):
        measured_workload(workspace)


GOOD_FLEET = """
groups:
  - {name: a, accelerator: x, gpus: 2, price_per_gpu_hour: 1.5, tokens_per_s: 1e3}
"""


def test_fleet_files_load(tmp_path):
    file = tmp_path / "fleet.yaml"
    file.write_text(GOOD_FLEET)
    assert load_fleet(file).groups[0].tokens_per_s == 1000


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpus:", "gpu:", r"groups\.0\.gpu: unknown key\. Did you mean 'gpus'\?"),
        ("groups:", "group:", r"group: unknown key\. Did you mean 'groups'\?"),
        ("gpus: 2", "gpus: none", r"groups\.0\.gpus: Input should be a valid integer"),
        ("gpus: 2", "gpus: 2, gpus_per_engine: 4", r"groups\.0: 2 gpus cannot be shared out in engines of 4"),
        ("tokens_per_s: 1e3", "curve: [[1, 0.01]]", r"groups\.0: a curve .* needs prefill_tokens_per_s"),
        ("tokens_per_s: 1e3", "prefill_tokens_per_s: 1", r"groups\.0: prefill_tokens_per_s without tokens_per_s"),
        ("groups:", "assume: {speed: 2}\ngroups:", r"assume\.speed: unknown key\. Did you mean 'speed_up'\?"),
        ("groups:", "groups: [", "is no valid YAML"),
    ],
)
def test_mistakes_in_a_fleet_file_name_the_key(tmp_path, old, new, message):
    file = tmp_path / "fleet.yaml"
    file.write_text(GOOD_FLEET.replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        load_fleet(file)


def test_an_empty_or_missing_fleet_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot be read .*fleet-example"):
        load_fleet(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(RecipeError, match="valid dictionary"):
        load_fleet(tmp_path / "empty.yaml")
