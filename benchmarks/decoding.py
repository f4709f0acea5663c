"""Decoding speed: an engine without any decoder, vLLM's n-gram and suffix decoding, and the retrieval decoder.

Each method runs in a process of its own, in turns, on the same requests: the default prompts over MovieLens-100K, in
each framework's words, SmolLM2-135M in bf16, greedy, a batch kept full from a queue, with the settings that vLLM's LLM
class chooses. Suffix decoding is given the texts that ours drafts from, as finished requests, before it starts; n-gram
reads a request's own tokens alone. Of their settings the fastest of each cell's first round goes on.

`refresh`: users whose history moved on by two behaviors since their text was written; `a month old`: by 30 days, at
least one behavior; `half known`: as refresh, but only every second user has a text. `new users` and `items`: ids
without a text. The pool is the same for all users. No request occurs twice in a process, so that what a method learns
on the way never answers a request word for word. Tokens/s count the whole of a request, its prompt included.
`--ablation`: ours, strict, with one source of drafts each.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
from owlrec_decoding.options import LEAD_TOKENS, DraftLimits, Relaxation

NEW_TOKENS = 200
REQUESTS = {1: 5, 4: 14, 16: 32, 64: 96}  # measured requests by batch size: more than it, so that places are refilled
MONTH_MS = 30 * 86_400_000
ITEM_TEXTS = 192  # in the pool
WORKLOADS = {  # with the batch sizes that are measured
    "refresh": tuple(REQUESTS),
    "new users": tuple(REQUESTS),
    "items": tuple(REQUESTS),
    "a month old": (4, 16),
    "half known": (4, 16),
}
RECIPE = Path(pipelines.__file__).parent / "recipes" / "movielens-100k.yaml"
PLAIN = "plain vLLM"
NGRAM, SUFFIX = "n-gram", "suffix decoding"  # with several settings
STRICT, RELAXED = "owlrec strict", "owlrec relaxed"
ALONE = "owlrec strict, "  # ablations: the one source of drafts follows


def _ngram(shortest: int, longest: int, tokens: int) -> dict[str, Any]:
    lengths = {"prompt_lookup_min": shortest, "prompt_lookup_max": longest}
    return {"method": "ngram", "num_speculative_tokens": tokens, **lengths}


METHODS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    f"{NGRAM} (2-4, 4)": _ngram(2, 4, 4),
    f"{NGRAM} (2-5, 8)": _ngram(2, 5, 8),
    f"{NGRAM} (1-3, 3)": _ngram(1, 3, 3),
    SUFFIX: {"method": "suffix"},
    f"{SUFFIX} (factor 2)": {"method": "suffix", "suffix_decoding_max_spec_factor": 2.0},
    f"{SUFFIX} (factor 4)": {"method": "suffix", "suffix_decoding_max_spec_factor": 4.0},
    STRICT: {"mode": "strict"},
    RELAXED: {"mode": "relaxed"},
    f"{RELAXED}, any margin": {"mode": "relaxed", "margin": None},
    f"{RELAXED}, margin 0.05": {"mode": "relaxed", "margin": 0.05},
    f"{RELAXED}, margin 0.2": {"mode": "relaxed", "margin": 0.2},
    f"{ALONE}own earlier text": {"mode": "strict", "source": "own"},
    f"{ALONE}texts of its kind": {"mode": "strict", "source": "kind"},
    f"{ALONE}just written": {"mode": "strict", "source": "live"},
    f"{ALONE}own prompt and answer": {"mode": "strict", "source": "context"},
}

Cell = tuple[str, str, int]  # framework, workload, batch size
Runs = dict[tuple[str, Cell], list[dict[str, Any]]]


def needed(workload: str) -> int:
    """Requests of a workload, two to warm each batch size up included."""
    return sum(REQUESTS[batch] + 2 for batch in WORKLOADS[workload])


def main() -> None:
    """Prepares requests and pools once, runs every method, prints medians with their spread."""
    parser = options_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", choices=list(REQUESTS), help="batch sizes")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS))
    parser.add_argument("--frameworks", nargs="+", choices=list(FRAMEWORKS), default=["kar"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--ablation", action="store_true", help="plain vLLM and ours by source, on refresh")
    parser.add_argument("--new-tokens", type=int, help=f"of an answer, usually {NEW_TOKENS}")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(json.loads(options.worker.read_text()))
        return
    quick = options.quick
    tokens = options.new_tokens or (NEW_TOKENS // 2 if quick else NEW_TOKENS)
    batches = options.batches or ([4] if quick else [4, 16] if options.ablation else list(REQUESTS))
    workloads = options.workloads or (["refresh"] if quick or options.ablation else list(WORKLOADS))
    rounds = options.rounds or (1 if quick else 3)
    usual = [PLAIN, STRICT, RELAXED] if quick else [m for m in METHODS if not m.startswith((ALONE, f"{RELAXED}, "))]
    methods = options.methods or ([PLAIN, *list(METHODS)[-5:]] if options.ablation else usual)
    if not importlib.util.find_spec("arctic_inference") and any(m.startswith(SUFFIX) for m in methods):
        methods = [m for m in methods if not m.startswith(SUFFIX)]
        print("skipped: suffix decoding (arctic-inference is not installed)")
    every = itertools.product(options.frameworks, workloads, batches)
    cells = [cell for cell in every if cell[2] in WORKLOADS[cell[1]]]
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), options.frameworks, new_tokens=tokens)
        for round_, method in itertools.product(range(rounds), methods):
            mine = [c for c in cells if round_ == 0 or method == _best_setting(runs, c, method)]
            for run in in_process(Path(folder), {**job, "method": method, "cells": mine}) if mine else ():
                runs.setdefault((method, tuple(run["cell"])), []).append(run)
            print(f"round {round_ + 1} of {rounds}: {method} done", file=sys.stderr, flush=True)
    figures = [f for c in cells for f in _figures(runs, c, methods)]
    show(f"{tokens} new tokens, median of {rounds} rounds", figures, options)


def _best_setting(runs: Runs, cell: Cell, method: str) -> str:
    """Of the settings of a peer, the one that was fastest in the first round of a cell; ours has none."""
    peer = next((peer for peer in (NGRAM, SUFFIX) if method.startswith(peer)), None)
    if peer is None:
        return method
    first = {m: rounds[0]["speed"] for (m, c), rounds in runs.items() if c == cell and m.startswith(peer)}
    return max(first, key=first.__getitem__)


def _figures(runs: Runs, cell: Cell, methods: list[str]) -> Iterator[Figure]:
    measure = f"{cell[0]}, {cell[1]}, batch {cell[2]}"
    plain = runs.get((PLAIN, cell))
    base = float(np.median([r["speed"] for r in plain])) if plain else None
    for method in [m for m in methods if m == _best_setting(runs, cell, m)]:
        rounds = runs[method, cell]
        speeds = [r["speed"] for r in rounds]
        speed, last = float(np.median(speeds)), rounds[-1]
        settings = sum(m.startswith(peer) for peer in (NGRAM, SUFFIX) if method.startswith(peer) for m in methods)
        name = f"{method}, best of {settings}" if settings else method
        spread = f" (±{(max(speeds) - min(speeds)) / 2 / speed * 100:.0f} %)" if len(speeds) > 1 else ""
        yield Figure(
            measure=measure,
            method=name,
            value=round(speed, 1),
            unit=f"tokens/s{spread}",
            ratio_to="plain",
            ratio=speed / base if base else None,
        )
        if method != PLAIN:
            yield Figure(measure=measure, method=name, value=round(last["per_step"], 2), unit="tokens/step")
            yield Figure(measure=measure, method=name, value=round(last["accepted"], 2), unit="accepted a draft token")
        if "relaxed" in method:
            yield Figure(measure=measure, method=name, value=round(last["relaxed"], 3), unit="relaxed a token")


def prepare(
    folder: Path, frameworks: Sequence[FrameworkName], *, new_tokens: int = NEW_TOKENS, refreshed: int | None = None
) -> dict[str, Any]:
    """Prompts of every workload and the texts of the pools, which plain vLLM writes, once per machine.

    refreshed: requests of `refresh`, None = as many as are measured.
    """
    recipe = load_recipe(RECIPE)
    raw = MovieLens100KSource(type="movielens-100k").load()
    now = recipe.split.model_copy(update={"cuts": ("now",)})
    histories = build_samples(raw.interactions, now, RATED).histories
    times = dict(zip(_pairs(raw.interactions), raw.interactions["timestamp"].to_pylist(), strict=True))
    catalog, tokenizer = ItemCatalog(raw.items), load_tokenizer(PACKAGED)
    sizes = {workload: needed(workload) for workload in WORKLOADS} | ({"refresh": refreshed} if refreshed else {})
    rows = [r for r in histories.to_pylist() if len(r["items"]) >= 8]
    month = {r["user_id"]: n for r in rows if 4 <= (n := _month_before(r, times)) < len(r["items"])}
    users, left = {"a month old": [r for r in rows if r["user_id"] in month][: sizes["a month old"]]}, 0
    rows = [r for r in rows if r not in users["a month old"]]
    for workload in ("refresh", "half known", "new users"):
        users[workload] = rows[left : left + sizes[workload]]
        left += sizes[workload]
    earlier = [
        *(_first_behaviors(r, len(r["items"]) - 2) for r in (*users["refresh"], *users["half known"][::2])),
        *(_first_behaviors(r, month[r["user_id"]]) for r in users["a month old"]),
    ]
    job: dict[str, Any] = {"new_tokens": new_tokens, "requests": {}, "pool_texts": {}}
    for name in frameworks:
        config = PromptConfig(framework=name)

        def prompts(part: list[dict[str, Any]], config: PromptConfig = config) -> list[tuple[int, str, str]]:
            shard = pa.Table.from_pylist(part, schema=histories.schema)
            count = lambda text: len(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
            made = user_prompts(raw.users, shard, catalog, config, recipe.domain, count)
            return [(p.id, p.system, p.text) for p in made]

        every = [(p.id, p.system, p.text) for p in item_prompts(raw.items, recipe.domain, name)]
        items = [every[i] for i in np.random.default_rng(0).permutation(len(every))]
        job["requests"][name] = {workload: prompts(users[workload]) for workload in users}
        job["requests"][name]["items"] = items[ITEM_TEXTS : ITEM_TEXTS + sizes["items"]]
        pooled = {"users": prompts(earlier), "items": items[:ITEM_TEXTS]}
        digest = fingerprint(pooled, model_identity(PACKAGED), new_tokens)[:16]
        texts = cache_folder("benchmarks") / f"decoding-{digest}.json"
        if not texts.exists():
            print(f"writing the {name} texts of the pools with plain vLLM, once", file=sys.stderr, flush=True)
            texts.write_text(json.dumps(list(in_process(folder, {**job, "method": PLAIN, "write": pooled}))))
        job["pool_texts"][name] = str(texts)
    return job


def _pairs(interactions: pa.Table) -> Iterator[tuple[int, int]]:
    return zip(interactions["user_id"].to_pylist(), interactions["item_id"].to_pylist(), strict=True)


def _month_before(row: dict[str, Any], times: Mapping[tuple[int, int], int]) -> int:
    """Behaviors of a user that are at least a month older than the last one."""
    moments = [times[row["user_id"], item] for item in row["items"]]
    return sum(moment <= moments[-1] - MONTH_MS for moment in moments)


def _first_behaviors(row: dict[str, Any], n: int) -> dict[str, Any]:
    return {**row, "items": row["items"][:n], "ratings": row["ratings"][:n]}


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
        figures = engine.run(pool, list(itertools.islice(queue, REQUESTS[batch])), batch)
        print(json.dumps({"cell": (framework, workload, batch), **figures}))


class _Engine:
    def __init__(self, method: dict[str, Any], job: dict[str, Any]) -> None:
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        self.ours, self.source, extra = "mode" in method, method.get("source"), {}
        self.rule = Relaxation(margin=method["margin"]) if "margin" in method else None
        self.new_tokens = job["new_tokens"]
        if self.ours:
            limits = DraftLimits() if self.source in (None, "live") else DraftLimits(live_tokens=0)
            extra = engine_arguments(DecodingConfig(mode=method["mode"]), limits=limits)
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
            ),
            usage_context=UsageContext.LLM_CLASS,
        )
        self.tokenizer = self.engine.get_tokenizer()
        if self.ours:
            self._open_pools(job)
        elif method.get("method") == "suffix":
            self._fill_suffix_tree(job)

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
            extra_args=self._drafting(pool, id_) if self.ours else None,
            **params,
        )
        self.engine.add_request(str(id_), {"prompt_token_ids": [*ids, *answer]}, sampling)

    def _drafting(self, pool: str, id_: int) -> dict[str, Any]:
        known = self.source in (None, "own", "kind")
        document = None if self.source == "kind" else id_
        return request_arguments([pool] if known else [], document, relaxation=self.rule)

    def _open_pools(self, job: dict[str, Any]) -> None:
        from owlrec_decoding.index import build_pool

        for name, texts in _pool_texts(job):
            pool = build_pool([t["tokens"] for t in texts], [t["id"] for t in texts], searchable=self.source != "own")
            self.engine.collective_rpc("owlrec_open_pools", args=({name: pool.to_bytes()},))

    def _fill_suffix_tree(self, job: dict[str, Any]) -> None:
        """Gives suffix decoding what ours drafts from, as requests that have finished."""
        worker = self.engine.model_executor.driver_worker.worker  # the engine runs in this process
        cache = worker.model_runner.drafter.suffix_cache
        for name, texts in _pool_texts(job):
            for text in texts:
                key, tokens = f"{name}-{text['id']}", np.array(text["tokens"], np.int32)
                cache.start_request(key, tokens[:LEAD_TOKENS])
                cache.add_active_response(key, tokens.tolist())
                cache.stop_request(key)


def _pool_texts(job: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name and texts of each pool."""
    for framework, file in job["pool_texts"].items():
        texts = json.loads(Path(file).read_text())
        for kind in ("users", "items"):
            yield f"{framework}-{kind}", [text for text in texts if text["pool"] == kind]


if __name__ == "__main__":
    main()
