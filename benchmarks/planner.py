"""The planner against measurement: a small run of MovieLens-100K, estimates from it, and the whole of it as it went.

Of every user the first 60 % of behaviors are in the tables, the next 20 % come as events. A small world of 200 users
is asked about individually and by cohorts, then refreshed; its figures plan three policies for all 943 users and 1,682
items: a text for each (individual), for each cohort (collective), and a refresh of who has acted (streaming). Then
these three are run and the errors printed: texts, tokens, and time, which is that of the stage with its start, for the
refresh that of its calls. Finished runs stay in --workspace and are not run again; 20 to 40 minutes on two cores.

`--measured A --against B C` prints the errors of plans from a finished run A for finished runs B and C, and runs none.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.samples import RATED, labeled
from benchmarks.table import Figure, options_parser, show
from owlrec.generation.engines import PACKAGED
from owlrec.ops.cost import (
    Demand,
    FleetConfig,
    FleetGroup,
    Horizon,
    Policy,
    TextKind,
    Workload,
    demand,
    estimate_cost,
    measured_workload,
)
from owlrec.recipe import Recipe
from owlrec.refresh.state import pointer
from owlrec.runs.stages import stage_function
from owlrec.runs.upkeep import run as run_refresh
from owlrec.schema import HISTORIES
from owlrec.shards import finish_stage, finished_stage
from owlrec.sources.datasets import MovieLens100KSource
from owlrec.workspace import Workspace, shards_for

READ, NEWS = 0.6, 0.2  # shares of a user's behaviors: in the tables, and then as events
SIZES = {"small": (200, 320), "whole": (None, None)}
QUICK = {"small": (60, 100), "whole": (150, 250)}
MACHINE = {"name": "this machine", "accelerator": "CPU", "gpus": 1, "price_per_gpu_hour": 0.0}
SHARD_ROWS = 128
Taken = dict[str, float]  # texts, tokens and seconds, by name


def main() -> None:
    """Runs what is not finished yet, and compares."""
    parser = options_parser(__doc__)
    parser.add_argument("--workspace", type=Path, default=Path("runs/planner"), help="holds the runs")
    parser.add_argument("--measured", help="a workspace to plan from, in place of the small run")
    parser.add_argument("--against", nargs="+", default=[], help="workspaces whose generation run is planned")
    options = parser.parse_args()
    figures = list(_finished_figures(options) if options.measured else _policy_figures(options))
    errors = [abs(f.ratio - 1) for f in figures if f.ratio is not None]
    figures.append(Figure(measure="largest error", method="planner", value=round(100 * max(errors), 1), unit="%"))
    show("planner against measurement", figures, options)


def _policy_figures(options: argparse.Namespace) -> Iterator[Figure]:
    folder = options.workspace / ("quick" if options.quick else "full")
    sizes, tokens = (QUICK, 16) if options.quick else (SIZES, 64)
    small = _run(folder / "small", sizes["small"], tokens, "both", refresh=True)
    individual = _run(folder / "individual", sizes["whole"], tokens, "individual", refresh=True)
    collective = _run(folder / "collective", sizes["whole"], tokens, "collective")
    workload = measured_workload(small, SHARD_ROWS)
    prepared = finished_stage(individual, "prepare")
    assert prepared is not None
    horizon = Horizon(users=int(prepared.counts["users"]), items=int(prepared.counts["items"]), refreshes=1)
    policies: dict[Policy, tuple[Mapping[TextKind, int], Workspace]] = {
        "individual": (demand("individual", horizon, workload).first, individual),
        "collective": (demand("collective", horizon, workload).first, collective),
        "streaming": (demand("streaming", horizon, workload).per_refresh, individual),
    }
    for policy, (texts, workspace) in policies.items():
        yield from _compared(policy, _planned(workload, texts), _taken(workspace, streaming=policy == "streaming"))


def _finished_figures(options: argparse.Namespace) -> Iterator[Figure]:
    workload = measured_workload(Workspace(options.measured), SHARD_ROWS)
    for name in options.against:
        workspace = Workspace(name)
        measured = measured_workload(workspace, SHARD_ROWS)
        texts = {kind: f.rows for kind, f in measured.texts.items() if kind in workload.texts and kind != "refresh"}
        taken = _taken(workspace, streaming=False)
        yield from _compared(Path(name).name, _planned(workload, texts), taken)


def _planned(workload: Workload, texts: Mapping[TextKind, int]) -> Taken:
    started = {} if "refresh" not in texts else {"startup_s": 0.0}
    fleet = FleetConfig(groups=[FleetGroup.model_validate({**MACHINE, **started})])
    estimate = estimate_cost(workload, fleet, Demand(texts))
    return {
        "texts": float(sum(texts.values())),
        "prompt tokens": estimate.expected("prompt tokens"),
        "output tokens": estimate.expected("output tokens"),
        "seconds": 3600 * estimate.expected("generate: wall hours"),
    }


def _taken(workspace: Workspace, *, streaming: bool) -> Taken:
    """What a finished run took, by its cards."""
    stage, workload = finished_stage(workspace, "generate"), measured_workload(workspace, SHARD_ROWS)
    assert stage is not None
    rows = {kind: f.rows for kind, f in workload.texts.items() if (kind == "refresh") == streaming}
    return {
        "texts": float(sum(rows.values())),
        "prompt tokens": float(workload.total("prompt_tokens", rows)[1]),
        "output tokens": float(workload.total("output_tokens", rows)[1]),
        "seconds": float(workload.total("engine_s", rows)[1]) if streaming else stage.seconds,
    }


def _compared(name: str, planned: Taken, taken: Taken) -> Iterator[Figure]:
    for unit, value in taken.items():
        yield Figure(measure=name, method="measured", value=round(value, 1), unit=unit)
        yield Figure(
            measure=name, method="planned", value=round(planned[unit], 1), unit=unit,
            ratio_to="measured", ratio=planned[unit] / value,
        )  # fmt: skip


def _recipe(folder: Path, tokens: int, mode: str) -> Recipe:
    values: dict[str, Any] = {
        "name": folder.name,
        "scenario": "movies",
        "workspace": str(folder),
        "source": {"type": "movielens-100k"},
        "shard_rows": SHARD_ROWS,
        "cohorts": None if mode == "individual" else {},
        "prompts": {"history_tokens": 128, "mode": mode},
        "engine": {"type": "vllm", "model": PACKAGED, "max_model_len": 1024, "max_num_seqs": 8},
        "decoding": {"mode": "strict"},
        "sampling": {"max_tokens": tokens},
        "quality": {"policy": {"repetition": "keep"}},
    }
    return Recipe.model_validate(values)


def _run(
    folder: Path, size: tuple[int | None, int | None], tokens: int, mode: str, *, refresh: bool = False
) -> Workspace:
    """A world of so many users and items, asked about, and refreshed once where that is asked for."""
    recipe, workspace = _recipe(folder, tokens, mode), Workspace(folder)
    if finished_stage(workspace, "prepare") is None:
        _prepare(workspace, size)
    stages = ["generate", *(["encode", "publish"] if refresh else [])]
    for stage in stages if recipe.cohorts is None else ["cohorts", *stages]:
        stage_function(stage)(recipe, workspace)
    if refresh and pointer(workspace).current is None:
        run_refresh(recipe, workspace)
    return workspace


def _prepare(workspace: Workspace, size: tuple[int | None, int | None]) -> None:
    raw = MovieLens100KSource(type="movielens-100k", max_users=size[0], max_items=size[1]).load()
    order = raw.interactions.sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("item_id", "ascending")])
    users, first, count = np.unique(order["user_id"].to_numpy(), return_index=True, return_counts=True)
    place = (np.arange(order.num_rows) - np.repeat(first, count)) / np.repeat(count, count)
    read, news = order.filter(pa.array(place < READ)), order.filter(pa.array((place >= READ) & (place < READ + NEWS)))
    tables = {"users": raw.users, "interactions": labeled(read), "histories": _histories(read)}
    for name, table in tables.items():
        workspace.write_table(name, table, key="user_id", n_shards=shards_for(len(users), SHARD_ROWS))
    workspace.write_table("items", raw.items, key="item_id", n_shards=shards_for(raw.items.num_rows, SHARD_ROWS))
    workspace.write_parquet("events/news.parquet", news)
    counts: dict[str, float | int | str] = {
        "users": raw.users.num_rows,
        "items": raw.items.num_rows,
        "labels": RATED.model_dump_json(),
    }
    finish_stage(workspace, "prepare", "planner" * 8, counts=counts)


def _histories(read: pa.Table) -> pa.Table:
    rows = [
        {"user_id": int(user), "as_of": int(behaviors["timestamp"].iloc[-1]), "items": behaviors["item_id"].tolist(),
         "ratings": behaviors["rating"].tolist()}
        for user, behaviors in read.to_pandas().groupby("user_id")
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=HISTORIES)


if __name__ == "__main__":
    main()
