"""Batch generation beside its peers: 1,000 real prompts (KAR's, MovieLens-100K users), SmolLM2-135M, decoder off.

Raw `vllm.LLM.generate`, `ray.data.llm` and OwlRec, from prompts to texts, one engine. Each runs in a process of its
own, in turns; loading the model is not counted, Ray's own start-up of a job is. What the job costs without a model is
measured by `benchmarks.scale`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.samples import RATED
from benchmarks.table import Figure, options_parser, show
from owlrec.generation import VllmEngineConfig
from owlrec.generation.engines import PACKAGED, SamplingConfig, resolve_model
from owlrec.generation.job import (
    SHARDS_IN_FLIGHT,
    GenerateConfig,
    GenerateStage,
    GenerationJob,
    build_job,
    table_inputs,
)
from owlrec.generation.quality import QualityConfig
from owlrec.generation.vllm_engine import prepare_environment
from owlrec.prompting.prompts import PromptConfig, user_prompts
from owlrec.runner import Pool, run_stage
from owlrec.runs.stages import engine_cpus, ray_session
from owlrec.scenario import get_scenario
from owlrec.shards import finish_stage
from owlrec.sources.datasets import MovieLens100KSource
from owlrec.sources.splits import ItemCatalog, SplitConfig, build_samples
from owlrec.workspace import Workspace

PROMPTS, NEW_TOKENS, ROWS_AT_ONCE = 1000, 64, 128
RAW, RAY, OURS = "vllm.LLM.generate", "ray.data.llm", "owlrec"


def main() -> None:
    """Runs what is asked for; each measurement in a fresh process."""
    parser = options_parser(__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(json.loads(options.worker))
        return
    quick = options.quick
    show("batch generation", _speed(64 if quick else PROMPTS, options.rounds or (1 if quick else 3)), options)


def _in_process(**job: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.generation", "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _speed(prompts: int, rounds: int) -> list[Figure]:
    speeds: dict[str, list[float]] = {RAW: [], RAY: [], OURS: []}
    with tempfile.TemporaryDirectory() as folder:
        _movielens(Workspace(folder), prompts)
        for round_ in range(rounds):
            for method, rates in speeds.items():
                rates.append(_in_process(method=method, folder=folder)["speed"])
                print(f"round {round_ + 1} of {rounds}: {method} {rates[-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    raw = float(np.median(speeds[RAW]))
    peer = float(np.median(speeds[RAY]))
    figures = []
    for method, rates in speeds.items():
        speed = float(np.median(rates))
        unit = f"tokens/s (±{(max(rates) - min(rates)) / 2 / speed:.0%})"
        measure = f"{prompts} prompts, one engine"
        figures.append(
            Figure(measure=measure, method=method, value=round(speed, 1), unit=unit, ratio_to=RAW, ratio=speed / raw)
        )
    figures.append(
        Figure(measure=measure, method=OURS, value=round(speed, 1), unit="tokens/s", ratio_to=RAY, ratio=speed / peer)
    )
    return figures


def _movielens(workspace: Workspace, prompts: int) -> None:
    """Users of MovieLens-100K, some of them twice under another id where more are asked for than there are."""
    raw = MovieLens100KSource(type="movielens-100k").load()
    histories = build_samples(raw.interactions, SplitConfig(cuts=("half",)), RATED).histories
    users, catalog = raw.users, raw.items
    more = max(0, prompts - histories.num_rows)
    if more:  # the same user one behavior earlier is another prompt
        rows = [
            {**r, "user_id": r["user_id"] + 10**6, "items": r["items"][:-1], "ratings": r["ratings"][:-1]}
            for r in histories.slice(0, more).to_pylist()
        ]
        histories = pa.concat_tables([histories, pa.Table.from_pylist(rows, histories.schema)])
    histories = histories.slice(0, prompts)
    workspace.write_table("users", users, key="user_id", n_shards=4)
    workspace.write_table("histories", histories, key="user_id", n_shards=4)
    workspace.write_table("items", catalog, key="item_id", n_shards=1)
    finish_stage(workspace, "prepare", "b" * 64)


def _work(task: dict[str, Any]) -> None:
    """One measurement, in its own process; prints it as a line of JSON."""
    workspace = Workspace(task["folder"])
    result = {RAW: _raw, RAY: _ray_data_llm, OURS: _ours}[task["method"]](workspace, task)
    print(json.dumps(result))


def _engine() -> VllmEngineConfig:
    return VllmEngineConfig(type="vllm", model=PACKAGED, max_model_len=1024, max_num_seqs=ROWS_AT_ONCE)


def _job(engine: VllmEngineConfig, quality: QualityConfig) -> GenerationJob:
    sampling = SamplingConfig(max_tokens=NEW_TOKENS)
    prompts = PromptConfig(history_tokens=128)
    return build_job(get_scenario("movies"), prompts, sampling, engine, quality=quality)


def _prompts(workspace: Workspace) -> list[list[dict[str, str]]]:
    """The conversations that OwlRec would ask about."""
    from owlrec.generation.engines import load_tokenizer

    tokenizer, job = load_tokenizer(PACKAGED), _job(_engine(), QualityConfig())
    rows = user_prompts(
        workspace.read_table("users"), workspace.read_table("histories"), ItemCatalog.load(workspace),
        job.prompts, job.scenario, lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
    )  # fmt: skip
    return [[{"role": "system", "content": r.system}, {"role": "user", "content": r.text}] for r in rows]  # type: ignore[union-attr]


def _raw(workspace: Workspace, _: dict[str, Any]) -> dict[str, Any]:
    conversations = _prompts(workspace)
    prepare_environment(_engine(), cpu=True)
    from vllm import LLM, SamplingParams

    llm = LLM(**_engine_arguments(), disable_log_stats=True)
    start = time.perf_counter()
    outputs = llm.chat(conversations, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0), use_tqdm=False)  # type: ignore[arg-type]
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    return {"speed": tokens / (time.perf_counter() - start)}


def _engine_arguments() -> dict[str, Any]:
    return {
        "model": resolve_model(PACKAGED), "max_model_len": 1024, "max_num_seqs": ROWS_AT_ONCE,
        "enforce_eager": True, "block_size": 32, "dtype": "auto",
    }  # fmt: skip


def _ray_data_llm(workspace: Workspace, _: dict[str, Any]) -> dict[str, Any]:
    """Its actors live as long as one data set, so that what loading takes is found by a second, small one."""
    conversations = _prompts(workspace)
    prepare_environment(_engine(), cpu=True)
    # Its chat-template and tokenizer stages hold a logical CPU each, for which the engine would wait for ever on two.
    with ray_session("local[8]", workspace.log_path("ray")):
        small, all_ = (_ask_ray_data_llm(c) for c in (conversations[: len(conversations) // 16], conversations))
    return {"speed": (all_[0] - small[0]) / (all_[1] - small[1])}


def _ask_ray_data_llm(conversations: list[list[dict[str, str]]]) -> tuple[int, float]:
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    names = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    config = vLLMEngineProcessorConfig(
        model_source=resolve_model(PACKAGED),
        engine_kwargs={**_engine_arguments(), "distributed_executor_backend": "mp"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        concurrency=(1, 1),
        batch_size=ROWS_AT_ONCE,
        runtime_env={"env_vars": {name: os.environ[name] for name in names if name in os.environ}},
    )
    sampling = {"max_tokens": NEW_TOKENS, "temperature": 0.0}
    processor = build_processor(
        config,
        preprocess=lambda row: {"messages": json.loads(row["messages"]), "sampling_params": sampling},
        postprocess=lambda row: {"tokens": row["num_generated_tokens"]},
    )
    rows = [{"messages": json.dumps(c)} for c in conversations]
    start = time.perf_counter()
    tokens = sum(row["tokens"] for row in processor(ray.data.from_items(rows, override_num_blocks=8)).iter_rows())
    return tokens, time.perf_counter() - start


def _ours(workspace: Workspace, _: dict[str, Any]) -> dict[str, Any]:
    engine = _engine()
    job = _job(engine, QualityConfig(policy="off"))
    workspace.delete_dir(job.folder)
    pool = Pool(
        here=False,
        cpus=engine_cpus(engine, GenerateConfig()),
        in_flight=SHARDS_IN_FLIGHT,
        log_path=str(workspace.log_path("engine")),
    )
    with ray_session("local", workspace.log_path("ray")):
        cards = run_stage(workspace, GenerateStage(job, engine), table_inputs(workspace, ("user",)), pool).values()
    began, ended = min(c.finished - c.seconds for c in cards), max(c.finished for c in cards)
    return {"speed": sum(int(c.counts["output_tokens"]) for c in cards) / (ended - began)}


if __name__ == "__main__":
    main()
