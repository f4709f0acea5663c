"""The decoder's controller against an oracle that knows the step-time curve and every chance, without an engine.

Curves of GPUs (a file of measured step times, --curves), of a CPU and one with a sharp knee; batches of 1 to 512,
contexts of 255 to 1,023 tokens, five mixes of acceptance, noise, and steps that read prompts. Prints the worst cells;
all of them go into --json.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.table import Figure, options_parser, show
from owlrec.ops.console import note
from owlrec_decoding.simulate import Curve, Load, Trace, play, play_oracle, play_plain, table_curve

ROWS = (1, 16, 64, 128, 256, 512)
CONTEXTS = (255, 511, 1023)
DEPTH, NOISE = 16, 0.03
STEPS, RECOVERED, END = 500, 700, 800  # from step 500 on, all take three times as long
# Rates per token and their shares: a row's draft has one rate throughout, and 2 to 16 tokens.
MIXES = {
    "nothing known": ((0.0, 0.2, 0.4), (0.7, 0.2, 0.1)),
    "free text": ((0.0, 0.35, 0.6, 0.8), (0.4, 0.3, 0.2, 0.1)),
    "refresh": ((0.0, 0.35, 0.6, 0.8, 0.95), (0.25, 0.15, 0.2, 0.2, 0.2)),
    "word for word": ((0.8, 0.95, 0.99), (0.2, 0.4, 0.4)),
    "all or nothing": ((0.0, 0.97), (0.8, 0.2)),
}
LAUNCH_S = 0.0007  # of a step, which the GPU tables leave out
# Steps of SmolLM2-135M in bf16 on two cores: benchmarks/results/decoding*.json, plain vLLM at 1, 4, 16 and 64 rows.
CPU_TOKENS, CPU_S = (1, 4, 16, 64), (0.0249, 0.0339, 0.0632, 0.2057)


class Cell(NamedTuple):
    """One setting and what was played there, as ratios: to the oracle, to plain, after a threefold slow-down."""

    curve: str
    rows: int
    context: int
    mix: str
    of_oracle: float
    of_plain: float
    after_slow_down: float
    oracle_of_plain: float


def curves(file: Path | None) -> dict[str, Curve]:
    """The curves by name. file: `gemm_ms_by_tokens` and `attention_ms_by_sequences_and_context` by device; None =
    those that need no file."""
    found: dict[str, Curve] = {
        "sharp knee": lambda n, rows, context: np.maximum(1.0, np.asarray(n) / 295.0),
        "CPU": table_curve(CPU_TOKENS, CPU_S),
    }
    if file is None:
        return found
    data = json.loads(file.read_text())
    for name, gemm in data["gemm_ms_by_tokens"].items():
        table = data["attention_ms_by_sequences_and_context"].get(name.split("_")[0], {})
        attention = {int(r): {int(c): ms / 1e3 for c, ms in by.items()} for r, by in table.items()}
        tokens, seconds = [float(n) for n in gemm], [ms / 1e3 for ms in gemm.values()]
        found[name] = table_curve(tokens, seconds, attention, fixed_s=LAUNCH_S)
    return found


def mix_trace(mix: str, n: int = 4096, seed: int = 2) -> Trace:
    """Drafts of a mix."""
    rng = np.random.default_rng(seed)
    rates, shares = MIXES[mix]
    rate = rng.choice(rates, size=n, p=shares)
    return Trace(np.cumprod(np.repeat(rate[:, None], DEPTH, axis=1), axis=1), rng.integers(2, DEPTH + 1, size=n))


def load_of(rows: int, context: int) -> Load:
    """A prompt's piece of 512 tokens is read in every second step at 256 rows or more, in fewer at smaller batches."""
    return Load(rows, context, mixed=min(0.5, rows / 512), prefill=512)


def play_cell(name: str, curve: Curve, rows: int, context: int, mix: str) -> Cell:
    """Plays one setting."""
    trace, load = mix_trace(mix), load_of(rows, context)
    ran = play(curve, trace, load, END, noise=NOISE, slower_from=STEPS)
    best, plain = play_oracle(curve, trace, load, END), play_plain(curve, load, END)
    best_rate, plain_rate = best.rate(0, STEPS), plain.rate(0, STEPS)
    return Cell(
        curve=name,
        rows=rows,
        context=context,
        mix=mix,
        of_oracle=ran.rate(0, STEPS) / best_rate,
        of_plain=ran.rate(0, STEPS) / plain_rate,
        after_slow_down=3.0 * ran.rate(RECOVERED) / best.rate(RECOVERED),
        oracle_of_plain=best_rate / plain_rate,
    )


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """All cells, or with --quick some."""
    for name, curve in curves(options.curves).items():
        reads_context = float(curve(np.ones(1), 1, 1.0)[0]) != float(curve(np.ones(1), 1, 1e4)[0])
        for rows in ROWS[::2] if options.quick else ROWS:
            for context in CONTEXTS if reads_context and not options.quick else CONTEXTS[1:2]:
                yield from (play_cell(name, curve, rows, context, mix) for mix in MIXES)


def main() -> None:
    """Prints the worst cells of each curve."""
    parser = options_parser(__doc__)
    parser.add_argument("--curves", type=Path, help="JSON of measured step times")
    parser.add_argument("--worst", type=int, default=3, help="cells per curve and bar")
    options = parser.parse_args()
    played = []
    for cell in cells(options):
        played.append(cell)
        if len(played) % 30 == 0:
            note(f"{len(played)} cells, the worst so far {min(c.of_oracle for c in played):.3f} of the oracle")
    figures = []
    bars = {"of_oracle": 0.95, "of_plain": 0.98, "after_slow_down": 0.95}
    for bar, least in bars.items():
        missed = [cell for cell in played if getattr(cell, bar) < least]
        note(f"{bar}: {len(missed)} of {len(played)} cells below {least}")
        for name in dict.fromkeys(cell.curve for cell in played):
            worst = sorted((c for c in played if c.curve == name), key=lambda c: getattr(c, bar))[: options.worst]
            for c in worst:
                setting = f"{name}, {c.rows} rows, context {c.context}, {c.mix} (oracle {c.oracle_of_plain:.2f}x plain)"
                figures.append(Figure(measure=bar, method=setting, value=round(getattr(c, bar), 3), unit="x"))
    show("controller", figures, options)


if __name__ == "__main__":
    main()
