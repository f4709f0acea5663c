"""Decoding speed: plain vLLM, its n-gram and suffix speculation, and the retrieval decoder, strict and relaxed.

Each method runs in a process of its own, in turns, on the same requests: KAR prompts over MovieLens-100K, SmolLM2-135M
in bf16, greedy, 200 new tokens, a batch kept full from a queue. `refresh`: users whose history moved on by two
behaviours, drafts from all users' previous texts. `new users` and `items`: ids that the pool has no text of. No
request occurs twice in a process, so that what a method learns on the way never answers a request word for word.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.table import Figure, options_parser, show
from owlrec.decoding import DecodingConfig, engine_arguments, request_arguments
from owlrec.decoding.options import LEAD_TOKENS
from owlrec.environment import cache_folder
from owlrec.generation.models import PACKAGED, model_identity, resolve_model
from owlrec.generation.vllm_engine import VllmEngineConfig, prepare_environment
from owlrec.prompting.rows import ItemCatalog, Prompt, PromptConfig, item_prompts, user_prompts
from owlrec.scenario import get_scenario
from owlrec.sources.movielens import MovieLens100KSource
from owlrec.sources.splits import SplitConfig, build_samples
from owlrec.workspace import fingerprint

NEW_TOKENS = 200
POOL_TEXTS = 192  # of users, and as many of items
REQUESTS = {1: 8, 4: 16, 16: 48, 64: 96}  # measured requests by batch size
WORKLOADS = ("refresh", "new users", "items")
PLAIN = "plain vLLM"
METHODS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "n-gram (2-4, 4)": {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4, "num_speculative_tokens": 4},
    "n-gram (2-5, 8)": {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 5, "num_speculative_tokens": 8},
    "n-gram (1-3, 3)": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 3},
    "suffix decoding": {"method": "suffix"},
    "owlrec strict": {"mode": "strict"},
    "owlrec relaxed": {"mode": "relaxed"},
}


def main() -> None:
    """Prepares requests and pools once, runs every method, prints medians with their spread."""
    parser = options_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=None, choices=list(REQUESTS), help="batch sizes")
    parser.add_argument("--workloads", nargs="+", default=None, choices=WORKLOADS)
    parser.add_argument("--methods", nargs="+", default=None, choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(json.loads(options.worker.read_text()))
        return
    batches = options.batches or ([4] if options.quick else list(REQUESTS))
    workloads = options.workloads or (["refresh"] if options.quick else list(WORKLOADS))
    rounds = options.rounds or (1 if options.quick else 3)
    methods = options.methods or ([PLAIN, *list(METHODS)[-2:]] if options.quick else list(METHODS))
    skipped = (
        {} if importlib.util.find_spec("arctic_inference") else {"suffix decoding": "arctic-inference is not installed"}
    )
    with tempfile.TemporaryDirectory() as folder:
        job = _prepare(Path(folder), 24 if options.quick else POOL_TEXTS, quick=options.quick)
        job |= {"batches": batches, "workloads": workloads, "quick": options.quick}
        runs: dict[tuple[str, str, int], list[dict[str, float]]] = {}
        for round_, method in itertools.product(range(rounds), methods):
            if method in skipped:
                continue
            for found in _in_process(Path(folder), {**job, "method": method}):
                runs.setdefault((method, found["workload"], found["batch"]), []).append(found)
            print(f"round {round_ + 1} of {rounds}: {method} done", file=sys.stderr, flush=True)
    figures = [f for w in workloads for b in batches for f in _figures(runs, w, b)]
    for method, why in skipped.items():
        print(f"skipped: {method} ({why})")
    show(f"{NEW_TOKENS} new tokens, median of {rounds} rounds", figures, options)


def _figures(runs: dict[tuple[str, str, int], list[dict[str, float]]], workload: str, batch: int) -> Iterator[Figure]:
    plain = runs.get((PLAIN, workload, batch))
    base = float(np.median([r["speed"] for r in plain])) if plain else None
    for method in METHODS:
        found = runs.get((method, workload, batch))
        if not found:
            continue
        speeds, measure = [r["speed"] for r in found], f"{workload}, batch {batch}"
        spread = (max(speeds) - min(speeds)) / 2 / float(np.median(speeds)) * 100
        speed = float(np.median(speeds))
        ratio = speed / base if base else None
        yield Figure(
            measure=measure,
            method=method,
            value=round(speed, 1),
            unit=f"tokens/s (±{spread:.0f} %)",
            ratio_to="plain",
            ratio=ratio,
        )
        if method != PLAIN:
            last = found[-1]
            yield Figure(measure=measure, method=method, value=round(last["per_step"], 2), unit="tokens/step")
            yield Figure(
                measure=measure, method=method, value=round(last["accepted"], 2), unit="accepted a draft token"
            )
        if "relaxed" in method:
            yield Figure(measure=measure, method=method, value=round(found[-1]["relaxed"], 3), unit="relaxed a token")


def _prepare(folder: Path, n_pool: int, *, quick: bool) -> dict[str, Any]:
    """Prompts of every workload, and the texts that the pools hold: written by the plain engine, once a machine."""
    raw = MovieLens100KSource(type="movielens-100k").load()
    scenario = get_scenario("movies")
    histories = build_samples(raw.interactions, SplitConfig(), scenario.positive_above).histories
    catalog = ItemCatalog(raw.items)
    rows = [r for r in histories.to_pylist() if len(r["items"]) >= 8]
    needed = sum(REQUESTS.values()) + 2 * len(REQUESTS)
    before = [{**r, "items": r["items"][:-2], "ratings": r["ratings"][:-2]} for r in rows[:n_pool]]

    def users(part: list[dict[str, Any]]) -> list[Prompt]:
        shard = pa.Table.from_pylist(part, schema=histories.schema)
        return list(user_prompts(raw.users, shard, catalog, PromptConfig(), scenario, lambda text: len(text) // 4))

    all_items = list(item_prompts(raw.items, scenario))
    items = [all_items[i] for i in np.random.default_rng(0).permutation(len(all_items))]
    prompts = {
        "pool users": users(before),
        "pool items": items[:n_pool],
        "refresh": users(rows[:needed]),
        "new users": users(rows[n_pool : n_pool + needed]),
        "items": items[n_pool : n_pool + needed],
    }
    job: dict[str, Any] = {
        "requests": {
            name: [(p.id, p.system, p.text) for p in ps] for name, ps in prompts.items() if "pool" not in name
        },
        "pools": str(folder / "pools"),
    }
    pooled = {name: [(p.id, p.system, p.text) for p in ps] for name, ps in prompts.items() if "pool" in name}
    texts = (
        cache_folder("benchmarks") / f"decoding-{fingerprint(pooled, model_identity(PACKAGED), NEW_TOKENS)[:16]}.json"
    )
    if not texts.exists():
        print("writing the pool's texts with plain vLLM, once", file=sys.stderr, flush=True)
        found = list(_in_process(folder, {**job, "method": PLAIN, "write": pooled}))
        texts.write_text(json.dumps(found))
    job["pool_texts"] = str(texts)
    return job


def _in_process(folder: Path, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    command = [sys.executable, "-m", "benchmarks.decoding", "--worker", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job['method']} failed:\n{done.stderr[-3000:]}")
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def _work(job: dict[str, Any]) -> None:
    """One method in its process: each workload at each batch size, after a short warm-up of its own requests."""
    prepare_environment(VllmEngineConfig(type="vllm", model=PACKAGED), cpu=True)
    method = METHODS[job["method"]]
    engine = _Engine(method, job)
    for name, prompts in job.get("write", {}).items():
        for (id_, *_), text in zip(prompts, engine.texts(prompts), strict=True):
            print(json.dumps({"pool": name.split()[-1], "id": id_, "tokens": text}))
    if "write" in job:
        return
    for workload in job["workloads"]:
        queue = iter(job["requests"][workload])
        for batch in job["batches"]:
            n = batch * 2 if job["quick"] else REQUESTS[batch]
            engine.run(workload, list(itertools.islice(queue, 2)), batch)
            print(json.dumps(engine.run(workload, list(itertools.islice(queue, n)), batch)))


class _Engine:
    def __init__(self, method: dict[str, Any], job: dict[str, Any]) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.ours, extra = "mode" in method, {}
        if self.ours:
            self._write_pools(job)
            config = DecodingConfig(mode=method["mode"], pools=job["pools"])
            extra = engine_arguments(config, model_identity(PACKAGED), cpu=True)
        elif method:
            extra = {"speculative_config": method}
        if method:
            extra["per_request_spec_decode_metrics"] = "summary"
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=resolve_model(PACKAGED),
                dtype="bfloat16",
                max_model_len=1024,
                max_num_seqs=64,
                enforce_eager=True,
                block_size=32,
                disable_log_stats=True,
                **extra,
            )
        )
        self.tokenizer = self.engine.get_tokenizer()

    def run(self, workload: str, requests: list[Any], batch: int) -> dict[str, Any]:
        """Runs the requests, `batch` of them at a time."""
        start, tokens, row_steps, drafted, accepted, relaxed = time.perf_counter(), 0, 0, 0, 0, 0
        waiting = requests[::-1]
        while waiting or self.engine.has_unfinished_requests():
            while waiting and self.engine.get_num_unfinished_requests() < batch:
                self._add(workload, waiting.pop())
            row_steps += self.engine.get_num_unfinished_requests()
            for output in self.engine.step():
                if not output.finished:
                    continue
                answer = output.outputs[0]
                tokens += len(answer.token_ids)
                if answer.spec_decode_metrics is not None:
                    drafted += answer.spec_decode_metrics.num_draft_tokens
                    accepted += sum(j * n for j, n in enumerate(answer.spec_decode_metrics.histogram))
                if self.ours:
                    counts = self.engine.collective_rpc("owlrec_request_counts", args=([output.request_id],))[0]
                    relaxed += counts[output.request_id][2]
        seconds = time.perf_counter() - start
        return {
            "workload": workload,
            "batch": batch,
            "speed": tokens / seconds,
            "per_step": tokens / row_steps,
            "accepted": accepted / max(drafted, 1),
            "relaxed": relaxed / max(tokens, 1),
        }

    def texts(self, requests: list[Any]) -> list[list[int]]:
        """The texts of the requests, as tokens, each behind the end of its prompt."""
        found: dict[str, list[int]] = {}
        for request in requests:
            self._add("pool", request)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    found[output.request_id] = [*output.prompt_token_ids[-LEAD_TOKENS:], *output.outputs[0].token_ids]
        return [found[str(r[0])] for r in requests]

    def _add(self, workload: str, request: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        id_, system, text = request
        turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        pool = "items" if workload == "items" else "users"
        params = SamplingParams(
            max_tokens=NEW_TOKENS,
            temperature=0.0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=request_arguments([pool], id_) if self.ours else None,
        )
        self.engine.add_request(str(id_), {"prompt_token_ids": list(ids)}, params)

    @staticmethod
    def _write_pools(job: dict[str, Any]) -> None:
        from owlrec.decoding.pools import write_pool

        texts = json.loads(Path(job["pool_texts"]).read_text())
        for pool in ("users", "items"):
            mine = [t for t in texts if t["pool"] == pool]
            sequences, ids = [t["tokens"] for t in mine], [t["id"] for t in mine]
            write_pool(job["pools"], pool, sequences, ids, identity=model_identity(PACKAGED), max_tokens=10**7)


if __name__ == "__main__":
    main()
