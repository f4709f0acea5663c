"""The pages that figures are shown on: RESULTS.md, all of them, and the README's tables, some of them.

A table of the README stands between two comments, of which the first names a part and, behind a colon, a regular
expression that chooses its rows: `<!-- results decoding: tokens/s -->` … `<!-- end of results -->`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from benchmarks.plan import LONG_PARTS, PARTS, Part
from benchmarks.table import Figure
from owlrec.ops.report import bar_chart, standalone

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
_BLOCK = re.compile(r"(<!-- results ([\w-]+): (.+?) -->\n).*?(<!-- end of results -->)", re.DOTALL)


class Result(BaseModel):
    """What a part found, and how."""

    command: str
    hardware: str
    day: str
    seconds: int
    figures: list[Figure]


def render_pages() -> None:
    """Writes both pages, and a plot beside the figures of parts that compare methods."""
    results = read_results()
    for name, result in results.items():
        if chart := _plot(result.figures):
            (RESULTS / f"{name}.svg").write_text(chart + "\n")
    (HERE / "RESULTS.md").write_text(results_page(results))
    README.write_text(readme_with(README.read_text(), results))


def read_results() -> dict[str, Result]:
    """Of every part that has run, in the plan's order."""
    files = {part.name: RESULTS / f"{part.name}.json" for part in (*PARTS, *LONG_PARTS)}
    return {n: Result.model_validate_json(f.read_text()) for n, f in files.items() if f.exists()}


def results_page(results: dict[str, Result]) -> str:
    """All figures of all parts, and what is missing."""
    minutes = sum(r.seconds for n, r in results.items() if n in {p.name for p in PARTS}) / 60
    parts = [
        "# Results",
        "`make bench` measures the first group of parts and renders this page and the README's tables from "
        f"`benchmarks/results/`; those shown took {minutes:.0f} minutes together. A part of the second group takes "
        "longer and runs by its name: `python -m benchmarks NAME`. Ratios hold within one part, which runs its peers "
        "in turns on the same machine; between parts the machine may differ, so each names its own.",
        (HERE / "lessons.md").read_text().strip(),
    ]
    for title, group in (("The full round", PARTS), ("Longer parts", LONG_PARTS)):
        parts.append(f"## {title}")
        parts += [_section(part, results[part.name]) for part in group if part.name in results]
        if missing := [f"`{part.name}`" for part in group if part.name not in results]:
            parts.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def readme_with(text: str, results: dict[str, Result]) -> str:
    """The README with its tables as the results say; raises KeyError for a part without any."""

    def filled(block: re.Match[str]) -> str:
        result = results[block[2]]
        rows = "\n".join(_table(f for f in result.figures if re.search(block[3], f"{f.measure}, {f.method}, {f.unit}")))
        return f"{block[1]}\n{rows}\n\n`{result.command}`\n\n{block[4]}"

    return _BLOCK.sub(filled, text)


def _section(part: Part, result: Result) -> str:
    lines = [f"### {part.name}", "", part.question, ""]
    took = f"{result.seconds / 60:.0f} min" if result.seconds >= 100 else f"{result.seconds} s"
    lines += [f"`{result.command}`: {took}, {result.hardware}, {result.day}", ""]
    if (RESULTS / f"{part.name}.svg").exists():
        lines += [f"![{part.name}](results/{part.name}.svg)", ""]
    return "\n".join([*lines, *_table(result.figures)])


def _table(figures: Iterable[Figure]) -> Iterator[str]:
    yield "| measure | method | value | ratio |"
    yield "|---|---|---|---|"
    for figure in figures:
        ratio = f"{figure.ratio:.2f}x {figure.ratio_to}" if figure.ratio is not None else ""
        value = "skipped" if math.isnan(figure.value) else f"{_number(figure.value)} {figure.unit}".rstrip()
        yield f"| {figure.measure} | {figure.method} | {value} | {ratio} |"


def _number(value: float) -> str:
    """Four significant digits, whole numbers in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.4g}"  # + 0.0: no minus before nothing


def _plot(figures: Sequence[Figure]) -> str:
    """Bars of the ratios to a peer; nothing where fewer than three figures have one."""
    ratios = {f"{f.measure}: {f.method}": f.ratio for f in figures if f.ratio is not None}
    return standalone(bar_chart(ratios, f"x {_peer(figures)}")) if len(ratios) >= 3 else ""


def _peer(figures: Sequence[Figure]) -> str:
    peers = {f.ratio_to for f in figures if f.ratio is not None and f.ratio_to}
    return peers.pop() if len(peers) == 1 else "the peer"
