"""What the decoder costs the host: microseconds per row and step of search and bookkeeping, on one core, without a
model.

256 rows write held-out texts of a file again, as greedy decoding would: the proposer gets what a step emitted and
answers with drafts, of which the right prefix is accepted in the next step. Its pools hold 300,000 tokens of the other
texts, and each row has an earlier text of its own (another one of the file) and 200 tokens of prompt. Without a file,
texts are drawn from a Markov chain of words. `verification` compares the verifier with an argmax over the same logits.
"""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from benchmarks.replay import prefix, read_column, tokenize
from benchmarks.table import Figure, options_parser, show
from owlrec.generation.engines import PACKAGED, load_tokenizer
from owlrec_decoding import DecodingConfig, engine_arguments, request_arguments
from owlrec_decoding.controller import Controller, StepTimes
from owlrec_decoding.drafter import RetrievalProposer
from owlrec_decoding.index import build_pool
from owlrec_decoding.options import SETTINGS_KEY
from owlrec_decoding.verification import Verifier

ROWS, POOL_TOKENS, PROMPT, VOCABULARY = 256, 300_000, 200, 49_152
WIDTH = 1024  # a row's context


def main() -> None:
    """Prints medians over all steps of each round."""
    parser = options_parser(__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="Parquet or CSV with columns id and text")
    parser.add_argument("--tokenizer", default=PACKAGED, help="a model's folder or hub name")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = _texts(options)
    figures = []
    for live in (False, True):
        rounds = [_host(texts, live=live) for _ in range(options.rounds)]
        for name in ("median", "p90", "worst 1 %", "median of the search alone"):
            values = [r[name] for r in rounds]
            measure = f"search and bookkeeping, {ROWS} rows, {'with' if live else 'without'} just written texts"
            spread = max(values) - min(values)
            method = f"{name} of {options.rounds} rounds (spread {spread:.1f})"
            figures.append(Figure(measure=measure, method=method, value=float(np.median(values)), unit="µs per row"))
    ratios = [_verification() for _ in range(options.rounds)]
    method = f"median of {options.rounds} rounds (spread {max(ratios) - min(ratios):.3f})"
    figures.append(Figure(measure="verification", method=method, value=float(np.median(ratios)), unit="of an argmax"))
    show("decoder host cost", figures, options)


def _texts(options: argparse.Namespace) -> list[np.ndarray]:
    if options.file:
        texts = tokenize(read_column(options.file, "text"), load_tokenizer(options.tokenizer))
        order = np.random.default_rng(0).permutation(len(texts))
        every = list(texts.values())
        return [every[i] for i in order]
    rng = np.random.default_rng(0)
    followers = rng.integers(10, 5000, (5000, 6))
    texts_ = []
    for _ in range(4000):
        text = [int(rng.integers(10, 5000))]
        while len(text) < 150:
            text.append(int(followers[text[-1], min(5, int(rng.geometric(0.5)) - 1)]))
        texts_.append(np.array([*text, 0], np.int32))
    return texts_


def _host(texts: list[np.ndarray], *, live: bool) -> dict[str, float]:
    settings = engine_arguments(DecodingConfig(mode="strict"), cpu=True)["additional_config"]
    model = SimpleNamespace(max_model_len=WIDTH, get_vocab_size=lambda: 1 << 21)  # of any tokenizer
    config = SimpleNamespace(additional_config=settings, model_config=model)
    if not live:
        settings[SETTINGS_KEY]["limits"]["live_tokens"] = 0
    proposer = RetrievalProposer(config)
    proposer.load_model(None)
    replayed, pooled, used = texts[: 2 * ROWS], list[np.ndarray](), 0
    for text in texts[2 * ROWS :]:
        used += len(text) + 1
        if used > POOL_TOKENS:
            break
        pooled.append(text)
    proposer.pools.open("kind", build_pool(pooled))
    proposer.pools.open("own", build_pool(texts[-ROWS * 2 :], list(range(2 * ROWS)), searchable=False))
    requests = {
        f"{i}": SimpleNamespace(
            sampling_params=SamplingParams(
                max_tokens=WIDTH, temperature=0.0, extra_args=request_arguments(["own", "kind"], i)
            )
        )
        for i in range(len(replayed))
    }
    batch = SimpleNamespace(req_ids=[f"{i}" for i in range(ROWS)], num_prompt_tokens=np.full(ROWS, PROMPT))
    runner = SimpleNamespace(requests=requests, input_batch=batch)
    verifier = SimpleNamespace(verdict=SimpleNamespace(relaxed=np.zeros(ROWS, np.int64)), rules=None)
    # An H100 with an 8B model: 5 ms up to 128 tokens, 9 at 512.
    points = [1, 64, 128, 256, 512, 1024], [5e-3, 5.3e-3, 5.7e-3, 6.7e-3, 8.9e-3, 18e-3]
    curve, times = StepTimes(*points), StepTimes(*points)
    controller = Controller(times, max_draft=proposer.limits.max_draft, max_step_tokens=2048)
    proposer.bind(runner, verifier, controller)
    rng = np.random.default_rng(1)
    contexts = np.zeros((ROWS, WIDTH), np.int32)
    contexts[:, :PROMPT] = rng.integers(10, 5000, (ROWS, PROMPT))
    lengths, at = np.full(ROWS, PROMPT), np.zeros(ROWS, np.int64)
    of_row, fresh = list(range(ROWS)), ROWS
    drafts: list[list[int]] = [[] for _ in range(ROWS)]
    taken, searching, searched = [], [], list[float]()

    def search(*arguments: Any) -> Any:
        began = time.perf_counter()
        found = own_search(*arguments)
        searched.append(time.perf_counter() - began)
        return found

    own_search, proposer._search = proposer._search, search  # type: ignore[method-assign]
    while fresh < len(replayed):
        emitted = []
        for row in range(ROWS):
            text = replayed[of_row[row]]
            n = min(prefix(np.array(drafts[row], np.int32), text[at[row] :]) + 1, len(text) - at[row])
            emitted.append(text[at[row] : at[row] + n].tolist())
            contexts[row, lengths[row] : lengths[row] + n] = text[at[row] : at[row] + n]
            lengths[row] += n
            at[row] += n
        searched.clear()
        start = time.perf_counter()
        proposer.begin_step({batch.req_ids[row]: len(draft) for row, draft in enumerate(drafts) if draft})
        drafts = proposer.propose(emitted, lengths, contexts)
        drafted, context, written = sum(map(len, drafts)), int(lengths.sum()), sum(map(len, emitted))
        seconds = float(curve(ROWS + drafted)[0])
        controller.observe(ROWS, drafted, seconds, prefill=0, context=context, emitted=written)
        taken.append((time.perf_counter() - start) / ROWS * 1e6)
        searching.append(sum(searched) / ROWS * 1e6)
        for row in range(ROWS):
            if at[row] >= len(replayed[of_row[row]]) and fresh < len(replayed):
                proposer.finish(batch.req_ids[row], [1], replayed[of_row[row]].tolist(), {0})
                of_row[row], batch.req_ids[row] = fresh, f"{fresh}"
                lengths[row], at[row], drafts[row], fresh = PROMPT, 0, [], fresh + 1
    steps = np.array(taken[5:])
    return {
        "median": float(np.median(steps)),
        "p90": float(np.quantile(steps, 0.9)),
        "worst 1 %": float(np.quantile(steps, 0.99)),
        "median of the search alone": float(np.median(searching[5:])),
    }


def _verification() -> float:
    """Seconds of verifying 64 rows of 4 drafts, relative to an argmax over the same logits."""
    rows, drafts = 64, 4
    logits = torch.randn(rows * (drafts + 1), VOCABULARY)
    best = logits.argmax(dim=-1).view(rows, drafts + 1)[:, :drafts]
    metadata = SpecDecodeMetadata.make_dummy(best.tolist(), torch.device("cpu"))
    place = torch.arange(rows * (drafts + 1)).view(rows, drafts + 1)
    metadata.target_logits_indices, metadata.bonus_logits_indices = place[:, :-1].flatten(), place[:, -1]
    sampling: Any = SimpleNamespace(
        all_greedy=True,
        no_penalties=True,
        max_num_logprobs=None,
        logprob_token_ids=None,
        bad_words_token_ids={},
        allowed_token_ids_mask=None,
        thinking_budget_state_holder=None,
        logitsprocs=LogitsProcessors([]),
    )
    verifier = Verifier(Sampler(), None, torch.device("cpu"))
    ours, theirs = [], []
    for _ in range(20):
        for times, run in (
            (theirs, lambda: logits.max(dim=-1)),
            (ours, lambda: verifier(metadata, None, logits, sampling)),
        ):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return float(np.median(ours) / np.median(theirs))


if __name__ == "__main__":
    main()
