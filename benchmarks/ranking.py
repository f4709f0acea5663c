"""The LLM ranker's speed and exactness: candidates a second, adapters beside peft, tuning beside TRL, retrieval.

`prefix`: 50 candidates for one user, shown 30 behaviors (retrieved once for all candidates, or for each) in prompts of
MovieLens-100K, SmolLM2-135M in bf16; the same prompts with and without vLLM's prefix cache, and one at a time through
transformers as ReLLa's released code does.
`parity`: a random adapter on 200 prompts in float32, vLLM against peft. `tuning`: tokens/s of tuning steps on the same
rows, model, adapter and batch as TRL's SFTTrainer. `retrieval`: one candidate against histories of 10^5 and 10^6.
Every engine and trainer runs in a process of its own. How well it ranks: `benchmarks.ranking_quality`.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import Figure, options_parser, show
from owlrec.encoding.compression import unit_rows
from owlrec.generation import VllmEngineConfig, token_counter
from owlrec.generation.engines import PACKAGED, load_tokenizer, resolve_model
from owlrec.prompting.frameworks import NO, YES, RankPromptConfig, rank_prompt
from owlrec.scenario import get_scenario
from owlrec.sources.datasets import MovieLens100KSource

PARTS = ("prefix", "parity", "tuning", "retrieval")
CANDIDATES, HISTORY = 50, 30
ENGINE: dict[str, Any] = {"type": "vllm", "model": PACKAGED, "max_model_len": 1536}
Question = tuple[str, str]


def main() -> None:
    """Prints the figures of all parts, or of those that are named."""
    parser = options_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        job = json.loads(options.worker.read_text())
        Path(job["result"]).write_text(json.dumps(globals()[f"_work_{job['do']}"](job)))
        return
    parts = options.only or (["prefix", "retrieval"] if options.quick else list(PARTS))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            figures += globals()[f"measure_{part}"](Path(folder), options.quick)
    show("LLM ranker", figures, options)


def measure_prefix(folder: Path, quick: bool) -> list[Figure]:
    """Candidates a second, by how much of a prompt the candidates share."""
    rounds = 1 if quick else 5
    figures = []
    for retrieved_for in ("set",) if quick else ("set", "candidate"):
        name, lists = f"retrieved for each {retrieved_for}", lists_of_questions(rounds + 1, retrieved_for)
        speeds = {}
        for caching in (True, False):
            job = {"do": "score", "lists": lists, "args": {"enable_prefix_caching": caching}}
            timed = in_process(folder, job)
            speeds["prefix cache" if caching else "no prefix cache"] = CANDIDATES / np.array(timed["seconds"])
        if retrieved_for == "set" and not quick:
            timed = in_process(folder, {"do": "one_by_one", "lists": lists[:3]})
            speeds["transformers, one at a time"] = CANDIDATES / np.array(timed["seconds"])
        base = statistics.median(speeds["no prefix cache"])
        for method, values in speeds.items():
            middle, spread = statistics.median(values), (max(values) - min(values)) / 2
            ratio = None if method == "no prefix cache" else middle / base
            unit = f"candidates/s ± {spread:.2g}, {1000 / middle:.1f} ms each"
            figures.append(
                Figure(
                    measure=f"{CANDIDATES} candidates, {name}",
                    method=method,
                    value=middle,
                    unit=unit,
                    ratio_to="no prefix cache" if ratio else None,
                    ratio=ratio,
                )
            )
    return figures


def measure_parity(folder: Path, quick: bool) -> list[Figure]:
    """How far a probability in vLLM is from peft's, and what an adapter costs."""
    n, timed = 20 if quick else 200, 20
    lists = lists_of_questions(-(-n // CANDIDATES), "set", history=10)
    questions = [q for asked in lists for q in asked][:n]
    adapter = str(folder / "adapter")
    expected = np.array(in_process(folder, {"do": "peft", "questions": questions, "adapter": adapter})["scores"])
    figures = []
    for dtype in ("float32", "bfloat16"):
        job = {"do": "score", "dtype": dtype, "args": {"enable_prefix_caching": False}}
        short = [questions[:timed], questions[:timed]]
        tuned = in_process(folder, {**job, "lists": [*short, questions], "adapter": adapter})
        plain = in_process(folder, {**job, "lists": short, "adapter": None})
        scores = np.array(tuned["scores"])
        pairs = np.triu_indices(n, 1)
        same = np.sign(np.subtract.outer(scores, scores)) == np.sign(np.subtract.outer(expected, expected))
        method = f"vLLM {dtype}, peft float32"
        figures += [
            Figure(
                measure="P(yes), largest difference", method=method, value=float(abs(scores - expected).max()), unit=""
            ),
            Figure(measure="pairs in the same order", method=method, value=100 * float(same[pairs].mean()), unit="%"),
            Figure(
                measure="speed with an adapter",
                method=f"vLLM {dtype}",
                value=timed / tuned["seconds"][0],
                unit="candidates/s",
                ratio_to="without",
                ratio=plain["seconds"][0] / tuned["seconds"][0],
            ),
        ]
    return figures


def measure_tuning(folder: Path, quick: bool) -> list[Figure]:
    """Real tokens a second of tuning, beside TRL where it is installed."""
    rows, batch, history = (64, 16, 10) if quick else (256, 32, HISTORY)  # four steps at least: two of ours are timed
    lists = lists_of_questions(-(-rows // CANDIDATES), "candidate", history)
    questions = [q for asked in lists for q in asked][:rows]
    answers = [YES if i % 2 else NO for i in range(rows)]
    job = {"questions": questions, "answers": answers, "batch": batch, "micro": 8, "dtype": "bfloat16"}
    speeds = {"owlrec": in_process(folder, {**job, "do": "tune"})["tokens_per_s"]}
    if importlib.util.find_spec("trl"):
        speeds["TRL SFTTrainer"] = in_process(folder, {**job, "do": "tune_by_trl"})["tokens_per_s"]
    else:
        print("skipped: TRL SFTTrainer (trl is not installed)", file=sys.stderr)
    peer = speeds.get("TRL SFTTrainer")
    return [
        Figure(
            measure=f"LoRA tuning, {rows} rows, batch {batch}, {history} behaviors",
            method=method,
            value=value,
            unit="tokens/s",
            ratio_to="TRL SFTTrainer" if peer and method == "owlrec" else None,
            ratio=value / peer if peer and method == "owlrec" else None,
        )
        for method, value in speeds.items()
    ]


def measure_retrieval(folder: Path, quick: bool) -> list[Figure]:
    """Milliseconds for the 15 behaviors nearest to one candidate, exactly, beside faiss's exact search.

    Items are drawn from 10^6, so that few repeat: the fewer do, the more there is to compare with.
    """
    import faiss

    from owlrec.ranking.behavior_retrieval import BehaviorRetriever

    rng, n_items, dim, k = np.random.default_rng(0), 10**6, 128, 15
    vectors = rng.standard_normal((n_items, dim), dtype=np.float32)
    ids = np.sort(rng.choice(2**62, n_items, replace=False))
    retriever = BehaviorRetriever(ids, vectors)
    figures = []
    for length in (10**5, 10**6):
        history = rng.choice(ids, length)
        opened = retriever.look_up(history)
        flat = faiss.IndexFlatIP(dim)
        flat.add(unit_rows(vectors[opened.rows]))
        candidates = rng.choice(ids, (5 if quick else 30, 1))
        queries = unit_rows(vectors[np.searchsorted(ids, candidates[:, 0])])
        ways: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]] = {
            "exact, history looked up before": (retriever.retrieve, [(opened, c, k) for c in candidates]),
            "exact, from the history's ids": (retriever.retrieve, [(history, c, k) for c in candidates]),
            "faiss IndexFlatIP of the items": (flat.search, [(query[None], k) for query in queries]),
        }
        for method, (search, asked) in ways.items():
            took = []
            for arguments in asked:
                start = time.perf_counter()
                search(*arguments)
                took.append(1000 * (time.perf_counter() - start))
            figures.append(
                Figure(
                    measure=f"retrieval, {length:,} behaviors, {len(opened.rows):,} distinct items",
                    method=method,
                    value=statistics.median(took),
                    unit=f"ms (p95 {np.percentile(took, 95):.1f})",
                )
            )
    return figures


def lists_of_questions(n_users: int, retrieved_for: str, history: int = HISTORY) -> list[list[Question]]:
    """Of each of `n_users` MovieLens-100K users with a long history, the questions about 50 films they had not seen.
    Shows `history` behaviors, retrieved once for a set of candidates or for each.

    Retrieved behaviors are drawn at random: which they are does not change the cost.
    """
    raw = MovieLens100KSource(type="movielens-100k").load()
    titles = dict(zip(raw.items["item_id"].to_pylist(), raw.items["title"].to_pylist(), strict=True))
    seen: dict[int, list[tuple[int, int, float]]] = {}
    for row in raw.interactions.to_pylist():
        seen.setdefault(row["user_id"], []).append((row["timestamp"], row["item_id"], row["rating"]))
    count = token_counter(VllmEngineConfig(**ENGINE))
    config = RankPromptConfig(retrieved_for=retrieved_for, history_tokens=1024)  # type: ignore[arg-type]
    profile, scenario = {"gender": "female", "age": "30"}, get_scenario("movies")
    rng = np.random.default_rng(0)
    lists = []
    for user in sorted(u for u, items in seen.items() if len(items) >= 2 * HISTORY)[:n_users]:
        behaviors = [(titles[item], rating) for _, item, rating in sorted(seen[user])]
        fresh = sorted(set(titles) - {item for _, item, _ in seen[user]})
        asked: list[Question] = []
        retrieved: list[tuple[str, float]] = []
        for item in rng.choice(fresh, CANDIDATES, replace=False).tolist():
            if not retrieved or retrieved_for == "candidate":
                drawn = sorted(rng.choice(len(behaviors), history, replace=False).tolist())
                retrieved = [behaviors[i] for i in drawn]
            asked.append(rank_prompt(scenario, profile, titles[item], config, count, retrieved=retrieved))
        lists.append(asked)
    return lists


def in_process(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What a job's worker returns, from a process of its own: two engines or trainers never share one."""
    result, file = folder / "result.json", folder / "job.json"
    file.write_text(json.dumps({**job, "result": str(result)}))
    command = [sys.executable, "-m", "benchmarks.ranking", "--worker", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job['do']} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(result.read_text())
    return answer


def _work_score(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each list after the first, which warms up, and the scores of the last."""
    from owlrec.ranking.scorer import LlmScorer

    config = {**ENGINE, "engine_args": job["args"], "dtype": job.get("dtype", "auto")}
    adapter = job.get("adapter")
    scorer = LlmScorer(VllmEngineConfig(**config), lora_rank=8 if adapter else None)
    seconds, scored = [], None
    for asked in job["lists"]:
        start = time.perf_counter()
        scored = asyncio.run(scorer.score([(q[0], q[1]) for q in asked], adapter))
        seconds.append(time.perf_counter() - start)
    scorer.close()
    assert scored is not None
    return {"seconds": seconds[1:], "scores": scored.probabilities.tolist()}


def _work_one_by_one(job: dict[str, Any]) -> dict[str, Any]:
    """As ReLLa's released code scores: one prompt at a time, all logits of its last position."""
    import torch

    net, render, _ = _transformers("bfloat16")
    seconds = []
    with torch.no_grad():
        for asked in job["lists"]:
            start = time.perf_counter()
            for question in asked:
                net(torch.tensor([render(question)]), logits_to_keep=1)
            seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:]}


def _work_peft(job: dict[str, Any]) -> dict[str, Any]:
    """Writes a random adapter and scores with it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from owlrec.ranking.scorer import find_answers, yes_probability

    torch.manual_seed(0)
    net, render, tokenizer = _transformers("float32")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(net, lora)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    tuned.save_pretrained(job["adapter"])
    answers = find_answers(tokenizer)
    with torch.no_grad():
        logits = [tuned(input_ids=torch.tensor([render(q)]), logits_to_keep=1).logits[0, -1] for q in job["questions"]]
    return {"scores": [yes_probability(row.numpy(), answers) for row in logits]}


def _work_tune(job: dict[str, Any]) -> dict[str, Any]:
    import pyarrow as pa

    from owlrec.ranking.lora import TuningProgress, load_model, tokenize, tune
    from owlrec.ranking.samples import TuningSettings

    rows = [
        {"user_id": 0, "item_id": i, "system": q[0], "text": q[1], "answer": answer}
        for i, (q, answer) in enumerate(zip(job["questions"], job["answers"], strict=True))
    ]
    examples = tokenize(pa.Table.from_pylist(rows), load_tokenizer(PACKAGED), max_tokens=4096)
    longest = int(examples.lengths.max())
    config = TuningSettings(
        batch_rows=job["batch"], micro_tokens=job["micro"] * longest, dtype=job["dtype"], epochs=1, learning_rate=1e-4
    )
    few = tokenize(pa.Table.from_pylist(rows[:2]), load_tokenizer(PACKAGED), max_tokens=4096)
    ticks: list[float] = []

    def on_step(progress: TuningProgress) -> None:
        ticks.append(time.perf_counter())

    tune(load_model(resolve_model(PACKAGED), None, config), examples, few, config, on_step=on_step)
    # The first step warms up, the last is followed by an evaluation.
    tokens = examples.lengths.sum() * (len(ticks) - 2) / len(ticks)
    return {"tokens_per_s": float(tokens / (ticks[-2] - ticks[0]))}


def _work_tune_by_trl(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    net, render, tokenizer = _transformers(job["dtype"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    turns = [
        {
            "prompt": [{"role": "system", "content": q[0]}, {"role": "user", "content": q[1]}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for q, answer in zip(job["questions"], job["answers"], strict=True)
    ]
    ticks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ticks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=net,
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=job["micro"],
                gradient_accumulation_steps=job["batch"] // job["micro"],
                num_train_epochs=1,
                learning_rate=1e-4,
                max_length=4096,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,  # the weights are bf16 already
                gradient_checkpointing=False,
                completion_only_loss=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(turns),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    tokens = sum(len(render(q)) for q in job["questions"]) * (len(ticks) - 1) / len(ticks)
    return {"tokens_per_s": tokens / (ticks[-1] - ticks[0])}


def _transformers(dtype: str) -> tuple[Any, Callable[[Question], list[int]], Any]:
    """The packaged model, what renders a question for it, and its tokenizer; on all cores."""
    import torch
    from transformers import AutoModelForCausalLM

    from owlrec.generation.engines import render_chat

    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = load_tokenizer(PACKAGED)
    net = AutoModelForCausalLM.from_pretrained(resolve_model(PACKAGED), dtype=getattr(torch, dtype))
    return net, lambda question: render_chat(tokenizer, question[0], question[1]), tokenizer


if __name__ == "__main__":
    main()
