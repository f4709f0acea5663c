"""How many tokens per step a file of texts gives, replayed as if greedy decoding wrote it, without any engine.

Held-out texts are written again: at each place a draft is made from the texts that are written already, its longest
right prefix is accepted, plus one token. As in an engine, a text stands behind the end of its prompt (here one token)
and before its end token, so that its beginning and its end are drafted, too. Beside it the plain vote of the longest
suffix, of the texts alone: n-grams of 8, 6, 4, 3 and 2 tokens, the most frequent follower again and again until the
product of its shares falls below .25. No more tokens are drafted per step than by that. Accepted tokens are told apart
by source: the row's own earlier text (--earlier), its cohort's texts (--cohorts), all texts of its kind, its own words
so far, and texts just written. With a file of step-time curves, the speed-up over steps without drafts, as the
controller plays it.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from benchmarks.controller import curves
from benchmarks.table import Figure, options_parser, show
from owlrec.generation.engines import PACKAGED, load_tokenizer
from owlrec.ops.console import note
from owlrec_decoding.index import CONTEXT, LIVE, NOTHING, SEALED, TEXT, LivePool, SearchSet, build_pool
from owlrec_decoding.pools import CELLS, AcceptanceRates, draft_rows
from owlrec_decoding.simulate import Load, Trace, play, play_plain

DEPTH = 16
VOTE_ORDERS, VOTE_FLOOR = (8, 6, 4, 3, 2), 0.25
TRIES = 8  # halvings of the span of chances below which a draft ends
ROWS = (1, 4, 16, 64, 128, 256, 512)
SOURCES = ("own earlier", "cohort", "kind", "own words", "just written")
_LIVE_TOKENS = 1 << 18

Texts = Mapping[int, np.ndarray]
"""Token ids by id, int32: one token that stands for the end of the prompt, the text, its end token."""


@dataclass
class Replayed:
    """What a replay counted. accepted: by source. drafts: of each row and step, chance, count and accepted."""

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    drafts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    row_us: list[float] = field(default_factory=list)  # microseconds of the search, per row, of each batch step

    @property
    def per_step(self) -> tuple[float, float]:
        """Tokens and drafted tokens per step of a row."""
        return self.tokens / self.steps, self.drafted / self.steps

    def trace(self) -> Trace:
        """The drafts, for the simulation."""
        return Trace(*(np.concatenate(parts) for parts in zip(*self.drafts, strict=True)))


@dataclass(frozen=True)
class Corpus:
    """What is written already. kind: of all ids; earlier: of the replayed ids themselves; cohorts: by id."""

    kind: Texts
    earlier: Texts = field(default_factory=dict)
    cohorts: Mapping[int, Any] = field(default_factory=dict)


def main() -> None:
    """Replays each file."""
    parser = options_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="Parquet or CSV with columns id and text")
    parser.add_argument("--tokenizer", default=PACKAGED, help="a model's folder or hub name")
    parser.add_argument("--held", type=int, default=150, help="texts to replay")
    parser.add_argument("--given", type=int, default=0, help="first tokens of each replayed text that are not counted")
    parser.add_argument("--written", type=float, default=1.0, help="share of the other texts that is written already")
    parser.add_argument("--earlier", type=Path, help="the replayed ids' own earlier texts, as a file of the same form")
    parser.add_argument("--cohorts", type=Path, help="Parquet or CSV with columns id and cohort")
    parser.add_argument("--batch", type=int, default=32, help="rows that are written at once")
    parser.add_argument("--curves", type=Path, help="JSON of measured step times")
    options = parser.parse_args()
    figures = [figure for file in options.files for figure in replay_file(file, options)]
    show("replay", figures, options)


def replay_file(file: Path, options: argparse.Namespace) -> list[Figure]:
    """The figures of one file."""
    tokenizer = load_tokenizer(options.tokenizer)
    texts = tokenize(read_column(file, "text"), tokenizer)
    ids = list(texts)
    shuffled = [ids[i] for i in np.random.default_rng(0).permutation(len(ids))]
    held, others = shuffled[: options.held], shuffled[options.held :]
    written = others[: round(options.written * len(others))]
    corpus = Corpus(
        {i: texts[i] for i in written},
        tokenize(read_column(options.earlier, "text"), tokenizer) if options.earlier else {},
        read_column(options.cohorts, "cohort") if options.cohorts else {},
    )
    replayed = {i: texts[i] for i in held}
    vote = replay_vote(list(replayed.values()), list(corpus.kind.values()), options.given)
    drafter = Drafter(corpus)
    low, high = 0.001, 1.0
    chosen = drafter.replay(replayed, options.batch, high, options.given)
    for _ in range(TRIES):
        floor = (low * high) ** 0.5
        tried = drafter.replay(replayed, options.batch, floor, options.given)
        if tried.per_step[1] > vote.per_step[1]:
            low = floor
        else:
            high, chosen = floor, tried
    note(f"{file.name}: {len(held)} texts replayed, {len(written):,} written already")
    figures = []
    for method, counted in (("plain vote", vote), ("owlrec", chosen)):
        tokens, drafted = counted.per_step
        figures.append(Figure(measure=f"{file.stem}, tokens per step", method=method, value=tokens, unit="tokens"))
        figures.append(Figure(measure=f"{file.stem}, drafted per step", method=method, value=drafted, unit="tokens"))
    for source in SOURCES:
        per_step = chosen.accepted[source] / chosen.steps
        figures.append(Figure(measure=f"{file.stem}, accepted per step", method=source, value=per_step, unit="tokens"))
    us = float(np.median(chosen.row_us))
    figures.append(Figure(measure=f"{file.stem}, search", method=f"batch {options.batch}", value=us, unit="µs per row"))
    if options.curves:
        figures += speed_ups(
            file.stem, drafter.replay(replayed, options.batch, 0.01, options.given).trace(), options.curves
        )
    return figures


def speed_ups(name: str, trace: Trace, curve_file: Path) -> list[Figure]:
    """Tokens/s over those without drafts, by device and batch: 500 tokens of context, pieces of prompts mixed in."""
    figures = []
    for device, curve in curves(curve_file).items():
        for rows in ROWS:
            load = Load(rows, 500, mixed=min(0.5, rows / 512), prefill=512)
            gain = play(curve, trace, load, 400, noise=0.03).rate() / play_plain(curve, load, 400).rate()
            figures.append(
                Figure(measure=f"{name}, speed-up", method=f"{device}, {rows} rows", value=gain, unit="x plain")
            )
    return figures


def read_column(file: Path, column: str) -> dict[int, Any]:
    """A column by id."""
    read = pa.csv.read_csv if file.suffix == ".csv" else pa.parquet.read_table
    table = read(file)
    return dict(zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True))


def tokenize(texts: Mapping[int, str], tokenizer: Any) -> dict[int, np.ndarray]:
    """Token ids, each text between the tokenizer's first and its end token."""
    ids = tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id or 0
    lead = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return {i: np.array([lead, *tokens, end], np.int32) for i, tokens in zip(texts, ids, strict=True)}


class Drafter:
    """The decoder's own search over a corpus."""

    def __init__(self, corpus: Corpus) -> None:
        """Builds the pools: one of the kind, one per cohort."""
        self._corpus = corpus
        self._kind = build_pool(list(corpus.kind.values()))
        members: dict[Any, list[np.ndarray]] = {}
        for i, text in corpus.kind.items():
            if i in corpus.cohorts:
                members.setdefault(corpus.cohorts[i], []).append(text)
        self._cohorts = {cohort: build_pool(texts) for cohort, texts in members.items()}

    def replay(self, texts: Texts, batch: int, floor: float, given: int = 0) -> Replayed:
        """Writes `texts`, so many at once, learning as the decoder does."""
        search_set, live, rates, out = SearchSet(), LivePool(_LIVE_TOKENS), AcceptanceRates(len(SOURCES)), Replayed()
        places = {cohort: search_set.add_sealed(pool) for cohort, pool in self._cohorts.items()}
        kind, just_written = search_set.add_sealed(self._kind), search_set.add_live(live)
        sources = {}
        for i in texts:
            own = [(TEXT, search_set.add_text(self._corpus.earlier[i]))] if i in self._corpus.earlier else []
            cohort = places.get(self._corpus.cohorts.get(i))
            near = [(SEALED, cohort)] if cohort is not None else []
            named = [("own earlier", own), ("cohort", near), ("kind", [(SEALED, kind)])]
            named += [("own words", [(CONTEXT, 0)]), ("just written", [(LIVE, just_written)])]
            found = [(*place, SOURCES.index(name)) for name, given in named for place in given]
            sources[i] = np.array([*found, *[(NOTHING, 0, 0)] * (len(SOURCES) - len(found))], np.int64)
        queue, width = list(texts), max(map(len, texts.values()))
        rows: list[int] = []
        contexts, lengths = np.zeros((batch, width), np.int32), np.zeros(batch, np.int64)
        while queue or rows:
            rows = [i for place, i in enumerate(rows) if not self._finished(place, i, texts, lengths, live)]
            keep = [place for place in range(batch) if lengths[place] > 0]
            contexts[: len(keep)], lengths[: len(keep)] = contexts[keep], lengths[keep]
            while queue and len(rows) < batch:
                i = queue.pop(0)
                contexts[len(rows), : len(texts[i])], lengths[len(rows)] = texts[i], min(1 + given, len(texts[i]))
                rows.append(i)
            lengths[len(rows) :] = 0
            search_set.renew_live(just_written, live)
            if rows:
                of_rows = np.stack([sources[i] for i in rows])
                self._step([texts[i] for i in rows], contexts, lengths, of_rows, search_set, rates, floor, out)
        return out

    @staticmethod
    def _finished(place: int, i: int, texts: Texts, lengths: np.ndarray, live: LivePool) -> bool:
        if lengths[place] < len(texts[i]):
            return False
        live.insert(texts[i])
        lengths[place] = 0
        return True

    @staticmethod
    def _step(
        texts: Sequence[np.ndarray],
        contexts: np.ndarray,
        lengths: np.ndarray,
        sources: np.ndarray,
        search_set: SearchSet,
        rates: AcceptanceRates,
        floor: float,
        out: Replayed,
    ) -> None:
        n = len(texts)
        rows, limits = np.arange(n), np.full(n, DEPTH)
        start = time.perf_counter()
        found = draft_rows(
            contexts,
            rows,
            lengths[:n].copy(),
            np.ones(n, np.int64),
            limits,
            np.ascontiguousarray(sources[:, :, :2]),
            np.ascontiguousarray(sources[:, :, 2]),
            search_set,
            rates.factors,
            depth=DEPTH,
            floor=floor,
        )
        out.row_us.append((time.perf_counter() - start) / n * 1e6)
        accepted = np.array([prefix(found.tokens[r, : found.count[r]], texts[r][lengths[r] :]) for r in range(n)])
        right = np.arange(DEPTH) < accepted[:, None]
        rates.observe(found.cell, found.expected, np.minimum(accepted + 1, found.count), accepted)
        out.accepted.update(Counter(SOURCES[g] for g in (found.cell[right] // CELLS).tolist()))
        out.drafts.append((found.chance, found.count, accepted))
        out.steps += n
        out.tokens += int(accepted.sum()) + n
        out.drafted += int(found.count.sum())
        lengths[:n] += accepted + 1


def prefix(draft: np.ndarray, text: np.ndarray) -> int:
    """How many tokens of a draft are those that the text goes on with."""
    n = min(len(draft), len(text))
    wrong = np.flatnonzero(draft[:n] != text[:n])
    return int(wrong[0]) if len(wrong) else n


def replay_vote(texts: Iterable[np.ndarray], pool: Iterable[np.ndarray], given: int = 0) -> Replayed:
    """The plain vote of the longest suffix, of the texts without what stands before and behind them."""
    followers: dict[tuple[int, ...], Counter[int]] = {}
    for text in pool:
        tokens = text[1:-1].tolist()
        for n in VOTE_ORDERS:
            for i in range(n, len(tokens)):
                followers.setdefault(tuple(tokens[i - n : i]), Counter())[tokens[i]] += 1
    best = {}
    for context, counts in followers.items():
        token, count = counts.most_common(1)[0]
        best[context] = (token, count / counts.total())
    out = Replayed()
    for text in texts:
        tokens, at = text[1:-1].tolist(), given
        while at < len(tokens):
            context, draft, chance = tokens[max(0, at - max(VOTE_ORDERS)) : at], [], 1.0
            while len(draft) < DEPTH:
                known = (best.get(tuple(context[-n:])) for n in VOTE_ORDERS if len(context) >= n)
                token, share = next((found for found in known if found is not None), (0, 0.0))
                chance *= share
                if chance < VOTE_FLOOR:
                    break
                draft.append(token)
                context.append(token)
            accepted = prefix(np.array(draft), np.array(tokens[at : at + len(draft)]))
            out.steps += 1
            out.drafted += len(draft)
            out.tokens += accepted + 1
            at += accepted + 1
    return out


if __name__ == "__main__":
    main()
