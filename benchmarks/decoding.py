"""Decoding speed: plain vLLM, its n-gram and suffix speculation, and the retrieval decoder, strict and relaxed.

Each method runs in a process of its own, in turns, on the same requests: the default prompts over MovieLens-100K, in
each framework's words, SmolLM2-135M in bf16, greedy, 200 new tokens, a batch kept full from a queue. `refresh`: users
whose history moved on by two behaviors, drafts from all users' previous texts. `new users` and `items`: ids that the
pool has no text of. No request occurs twice in a process, so that what a method learns on the way never answers a
request word for word. Tokens/s count the whole of a request, its prompt included.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import pipelines
from benchmarks.samples import RATED
from benchmarks.table import Figure, options_parser, show
from owlrec.generation.engines import PACKAGED, load_tokenizer, model_identity, resolve_model
from owlrec.generation.vllm_engine import VllmEngineConfig, prepare_environment
from owlrec.machine import cache_folder
from owlrec.prompting.frameworks import FrameworkName
from owlrec.prompting.prompts import FRAMEWORKS, PromptConfig, item_prompts, user_prompts
from owlrec.recipe import load_recipe
from owlrec.sources.datasets import MovieLens100KSource
from owlrec.sources.splits import ItemCatalog, build_samples
from owlrec.storage import fingerprint
from owlrec_decoding import DecodingConfig, engine_arguments, request_arguments
from owlrec_decoding.options import LEAD_TOKENS

NEW_TOKENS = 200
POOL_TEXTS = 192  # of users, and as many of items
REQUESTS = {1: 5, 4: 14, 16: 32, 64: 64}  # measured requests by batch size
WORKLOADS = ("refresh", "new users", "items")
RECIPE = Path(pipelines.__file__).parent / "recipes" / "movielens-100k.yaml"
NGRAM = "n-gram"  # several settings of vLLM's own method: the fastest of each cell's first round goes on
PLAIN = "plain vLLM"
METHODS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    f"{NGRAM} (2-4, 4)": {
        "method": "ngram",
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
        "num_speculative_tokens": 4,
    },
    f"{NGRAM} (2-5, 8)": {
        "method": "ngram",
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 5,
        "num_speculative_tokens": 8,
    },
    f"{NGRAM} (1-3, 3)": {
        "method": "ngram",
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
        "num_speculative_tokens": 3,
    },
    "suffix decoding": {"method": "suffix"},
    "owlrec strict": {"mode": "strict"},
    "owlrec relaxed": {"mode": "relaxed"},
}


_NEEDED = sum(REQUESTS.values()) + 2 * len(REQUESTS)  # of each workload, warm-ups included

Cell = tuple[str, str, int]  # framework, workload, batch size
Runs = dict[tuple[str, Cell], list[dict[str, Any]]]


def main() -> None:
    """Prepares requests and pools once, runs every method, prints medians with their spread."""
    parser = options_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", choices=list(REQUESTS), help="batch sizes")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--frameworks", nargs="+", choices=list(FRAMEWORKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(json.loads(options.worker.read_text()))
        return
    quick = options.quick
    batches = options.batches or ([4] if quick else list(REQUESTS))
    workloads = options.workloads or (["refresh"] if quick else list(WORKLOADS))
    frameworks = options.frameworks or (["kar"] if quick else list(FRAMEWORKS))
    rounds = options.rounds or (1 if quick else 3)
    methods = options.methods or ([PLAIN, *list(METHODS)[-2:]] if quick else list(METHODS))
    if not importlib.util.find_spec("arctic_inference") and "suffix decoding" in methods:
        methods.remove("suffix decoding")
        print("skipped: suffix decoding (arctic-inference is not installed)")
    cells = list(itertools.product(frameworks, workloads, batches))
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), frameworks, quick=quick)
        for round_, method in itertools.product(range(rounds), methods):
            mine = [c for c in cells if round_ == 0 or method in (_best_ngram(runs, c), *_others(methods))]
            for run in in_process(Path(folder), {**job, "method": method, "cells": mine}) if mine else ():
                runs.setdefault((method, tuple(run["cell"])), []).append(run)
            print(f"round {round_ + 1} of {rounds}: {method} done", file=sys.stderr, flush=True)
    figures = [f for c in cells for f in _figures(runs, c, methods)]
    show(f"{_new_tokens(quick)} new tokens, median of {rounds} rounds", figures, options)


def _others(methods: list[str]) -> list[str]:
    return [m for m in methods if not m.startswith(NGRAM)]


def _best_ngram(runs: Runs, cell: Cell) -> str | None:
    """The n-gram setting that was fastest in the first round of a cell."""
    first = {m: rounds[0]["speed"] for (m, c), rounds in runs.items() if c == cell and m.startswith(NGRAM)}
    return max(first, key=first.__getitem__) if first else None


def _figures(runs: Runs, cell: Cell, methods: list[str]) -> Iterator[Figure]:
    measure = f"{cell[0]}, {cell[1]}, batch {cell[2]}"
    plain = runs.get((PLAIN, cell))
    base = float(np.median([r["speed"] for r in plain])) if plain else None
    for method in [m for m in methods if not m.startswith(NGRAM) or m == _best_ngram(runs, cell)]:
        rounds = runs[method, cell]
        speeds = [r["speed"] for r in rounds]
        speed, last = float(np.median(speeds)), rounds[-1]
        name = f"{method}, best of {sum(m.startswith(NGRAM) for m in methods)}" if method.startswith(NGRAM) else method
        spread = (max(speeds) - min(speeds)) / 2 / speed * 100
        yield Figure(
            measure=measure,
            method=name,
            value=round(speed, 1),
            unit=f"tokens/s (±{spread:.0f} %)",
            ratio_to="plain",
            ratio=speed / base if base else None,
        )
        if method != PLAIN:
            yield Figure(measure=measure, method=name, value=round(last["per_step"], 2), unit="tokens/step")
            yield Figure(measure=measure, method=name, value=round(last["accepted"], 2), unit="accepted a draft token")
        if "relaxed" in method:
            yield Figure(measure=measure, method=name, value=round(last["relaxed"], 3), unit="relaxed a token")


def _new_tokens(quick: bool) -> int:
    return NEW_TOKENS // 2 if quick else NEW_TOKENS


def prepare(
    folder: Path, frameworks: Sequence[FrameworkName], *, quick: bool, requests: int = _NEEDED
) -> dict[str, Any]:
    """Prompts of every workload, `requests` each, and the texts of the pools: written by plain vLLM, once a machine."""
    recipe = load_recipe(RECIPE)
    raw = MovieLens100KSource(type="movielens-100k").load()
    histories = build_samples(raw.interactions, recipe.split, RATED).histories
    catalog, tokenizer = ItemCatalog(raw.items), load_tokenizer(PACKAGED)
    n_pool = 24 if quick else POOL_TEXTS
    rows = [r for r in histories.to_pylist() if len(r["items"]) >= 8]
    before = [{**r, "items": r["items"][:-2], "ratings": r["ratings"][:-2]} for r in rows[:n_pool]]
    job: dict[str, Any] = {"quick": quick, "requests": {}, "pool_texts": {}}
    for name in frameworks:
        config = PromptConfig(framework=name)

        def users(part: list[dict[str, Any]], config: PromptConfig = config) -> list[tuple[int, str, str]]:
            shard = pa.Table.from_pylist(part, schema=histories.schema)
            count = lambda text: len(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
            prompts = user_prompts(raw.users, shard, catalog, config, recipe.domain, count)
            return [(p.id, p.system, p.text) for p in prompts]

        every = [(p.id, p.system, p.text) for p in item_prompts(raw.items, recipe.domain, name)]
        items = [every[i] for i in np.random.default_rng(0).permutation(len(every))]
        job["requests"][name] = {
            "refresh": users(rows[:requests]),
            "new users": users(rows[n_pool : n_pool + requests]),
            "items": items[n_pool : n_pool + requests],
        }
        pooled = {"users": users(before), "items": items[:n_pool]}
        digest = fingerprint(pooled, model_identity(PACKAGED), NEW_TOKENS)[:16]
        texts = cache_folder("benchmarks") / f"decoding-{digest}.json"
        if not texts.exists():
            print(f"writing the {name} texts of the pools with plain vLLM, once", file=sys.stderr, flush=True)
            texts.write_text(json.dumps(list(in_process(folder, {**job, "method": PLAIN, "write": pooled}))))
        job["pool_texts"][name] = str(texts)
    return job


def in_process(folder: Path, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a process of its own prints, one JSON line each, that runs one method (see _work)."""
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
    """One method in its process: each of its cells, after a short warm-up of the cell's own requests.

    Other jobs: `write` asks for texts alone; `continue`, for how clear the next token is after a request's answer.
    """
    prepare_environment(VllmEngineConfig(type="vllm", model=PACKAGED), cpu=True)
    engine = _Engine(METHODS[job["method"]], job)
    for request, answer in job.get("continue", []):
        print(json.dumps({"gap": engine.lead_of_best(request, answer)}))
    for name, prompts in job.get("write", {}).items():
        for (id_, *_), text in zip(prompts, engine.texts(name, prompts), strict=True):
            print(json.dumps({"pool": name, "id": id_, "tokens": text}))
    queues: dict[tuple[str, str], Iterator[Any]] = {}
    for framework, workload, batch in job.get("cells", []):
        queue = queues.setdefault((framework, workload), iter(job["requests"][framework][workload]))
        pool = f"{framework}-{'items' if workload == 'items' else 'users'}"
        engine.run(pool, list(itertools.islice(queue, 2)), batch)
        n = batch if job["quick"] else REQUESTS[batch]
        figures = engine.run(pool, list(itertools.islice(queue, n)), batch)
        print(json.dumps({"cell": (framework, workload, batch), **figures}))


class _Engine:
    def __init__(self, method: dict[str, Any], job: dict[str, Any]) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.ours, extra = "mode" in method, {}
        self.new_tokens = _new_tokens(job["quick"])
        if self.ours:
            extra = engine_arguments(DecodingConfig(mode=method["mode"]))
        elif method:
            extra = {"speculative_config": method}
        if method:
            extra["per_request_spec_decode_metrics"] = "summary"
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=resolve_model(PACKAGED),
                dtype=job.get("dtype", "bfloat16"),
                max_model_len=1024,
                max_num_seqs=job.get("rows", 64),
                enforce_eager=True,
                block_size=32,
                disable_log_stats=True,
                **extra,
            )
        )
        self.tokenizer = self.engine.get_tokenizer()
        if self.ours:
            self._open_pools(job)

    def run(self, pool: str, requests: list[Any], batch: int) -> dict[str, Any]:
        """Runs the requests, `batch` of them at a time, with drafts from `pool`."""
        start, tokens, row_steps, drafted, accepted, relaxed = time.perf_counter(), 0, 0, 0, 0, 0
        waiting = requests[::-1]
        while waiting or self.engine.has_unfinished_requests():
            while waiting and self.engine.get_num_unfinished_requests() < batch:
                self._add(pool, waiting.pop())
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
            "speed": tokens / seconds,
            "per_step": tokens / row_steps,
            "accepted": accepted / max(drafted, 1),
            "relaxed": relaxed / max(tokens, 1),
        }

    def texts(self, pool: str, requests: list[Any]) -> list[list[int]]:
        """The texts of the requests, drafted from `pool`, as tokens behind the LEAD_TOKENS that end the prompt."""
        for request in requests:
            self._add(pool, request)
        by_request = {
            o.request_id: [*o.prompt_token_ids[-LEAD_TOKENS:], *o.outputs[0].token_ids] for o in self._finish()
        }
        return [by_request[str(r[0])] for r in requests]

    def lead_of_best(self, request: Any, answer: list[int]) -> float:
        """By how much the likeliest next token's logit exceeds the second's, after the prompt and `answer`."""
        self._add("", request, 1, answer, logprobs=2)
        (output,) = self._finish()
        best, second = sorted((v.logprob for v in output.outputs[0].logprobs[0].values()), reverse=True)[:2]
        return float(best - second)

    def _finish(self) -> Iterator[Any]:
        while self.engine.has_unfinished_requests():
            yield from (output for output in self.engine.step() if output.finished)

    def _add(
        self, pool: str, request: Any, new_tokens: int | None = None, answer: Sequence[int] = (), **params: Any
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        id_, system, text = request
        turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        sampling = SamplingParams(
            max_tokens=new_tokens or self.new_tokens,
            temperature=0.0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=request_arguments([pool], id_) if self.ours else None,
            **params,
        )
        self.engine.add_request(str(id_), {"prompt_token_ids": [*ids, *answer]}, sampling)

    def _open_pools(self, job: dict[str, Any]) -> None:
        from owlrec_decoding.index import build_pool

        for framework, file in job["pool_texts"].items():
            texts = json.loads(Path(file).read_text())
            for kind in ("users", "items"):
                mine = [t for t in texts if t["pool"] == kind]
                pool = build_pool([t["tokens"] for t in mine], [t["id"] for t in mine])
                self.engine.collective_rpc("owlrec_open_pools", args=({f"{framework}-{kind}": pool.to_bytes()},))


if __name__ == "__main__":
    main()
