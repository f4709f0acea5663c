"""Console output of stages: a header, a progress bar with rate and time left, a table at the end.

If the output is not a terminal (a Ray job's log, a file, CI), a bar becomes a plain line at most every ten seconds.
Texts are printed unchanged: titles and messages may contain rich's markup characters.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from owlrec.shards import Card

LINE_EVERY_S = 10.0
_PLAIN_WIDTH = 120
_SILENT = ContextVar("silent", default=False)


class Advance(Protocol):
    """Reports progress: `advance(n)`; other counts (`tokens=512`) are summed and shown with their rates."""

    def __call__(self, n: int = 1, **extra: int) -> None: ...


def stage_header(stage: str, about: str = "") -> None:
    """Prints the header of a stage."""
    console = _console()
    if console.is_terminal:
        console.print()
        console.print(Text.assemble((f"▸ {stage}", "bold cyan"), ("  " + about if about else "", "dim")))
    else:
        console.print(Text(f"== {stage}" + (f": {about}" if about else "")), soft_wrap=True)


def note(text: str) -> None:
    """Prints a line of information."""
    _console().print(Text(f"  {text}"), soft_wrap=True)


def warn(text: str) -> None:
    """Prints a warning."""
    _console().print(Text(f"  warning: {text}", "yellow"), soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under a title; numeric columns are right-aligned.

    Floats get four significant digits.
    """
    grid = Table(title=Text(title, "bold"), title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float) for row in rows)
        grid.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_cell(value)) for value in row))
    _console().print(grid)


@contextmanager
def progress(
    description: str, total: int | None, unit: str = "rows", hourly_cost: float | None = None
) -> Iterator[Advance]:
    """Shows progress while its block runs; yields the function to report it.

    total: expected number of `unit`; None if unknown. hourly_cost: the block's cost per hour, shown as cost
    so far. Among other counts, `steps` is shown as tokens per step.
    """
    counts = _Counts(description, total, unit, hourly_cost)
    console = _console()
    if not console.is_terminal:
        last = time.monotonic()

        def say(n: int = 1, **extra: int) -> None:
            nonlocal last
            counts.add(n, extra)
            if time.monotonic() - last >= LINE_EVERY_S:
                last = time.monotonic()
                console.print(Text(counts.line()), soft_wrap=True)

        try:
            yield say
        finally:
            console.print(Text(counts.line(ended=True)), soft_wrap=True)
        return
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=24),
        _CountsColumn(counts),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total)

        def show(n: int = 1, **extra: int) -> None:
            counts.add(n, extra)
            bar.advance(task, n)

        yield show


class _Counts:
    """Work done so far, and its speed."""

    def __init__(self, description: str, total: int | None, unit: str, hourly_cost: float | None = None) -> None:
        self.description, self.total, self.unit, self.hourly_cost = description, total, unit, hourly_cost
        self.done = 0
        self.extra: dict[str, int] = {}
        self._start = time.monotonic()

    def add(self, n: int, extra: dict[str, int]) -> None:
        self.done += n
        for name, value in extra.items():
            self.extra[name] = self.extra.get(name, 0) + value

    def figures(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-6)
        out_of = f"/{self.total:,}" if self.total is not None else ""
        parts = [f"{self.done:,}{out_of} {self.unit}", f"{_rate(self.done / seconds)} {self.unit}/s"]
        extra = {name: value for name, value in self.extra.items() if name != "steps"}
        parts += [f"{value:,} {name} ({_rate(value / seconds)}/s)" for name, value in extra.items()]
        if self.extra.get("steps", 0) > 0 and self.extra["steps"] < extra.get("tokens", 0):
            parts.append(f"{extra['tokens'] / self.extra['steps']:.2f} tokens per step")
        if self.hourly_cost is not None:
            parts.append(f"cost {self.hourly_cost * seconds / 3600:,.2f}")
        return ", ".join(parts)

    def line(self, ended: bool = False) -> str:
        seconds = time.monotonic() - self._start
        if ended:
            return f"  {self.description}: {self.figures()}, took {_duration(seconds)}"
        if not self.total or not self.done:
            return f"  {self.description}: {self.figures()}"
        left = seconds * max(self.total - self.done, 0) / self.done
        return f"  {self.description}: {self.figures()}, {_duration(left)} left"


class _CountsColumn(ProgressColumn):
    def __init__(self, counts: _Counts) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._counts = counts

    def render(self, task: Task) -> Text:
        return Text(self._counts.figures())


@contextmanager
def silent(on: bool = True) -> Iterator[None]:
    """Suppresses output in its block, for programs. on: False changes nothing."""
    before = _SILENT.set(on or _SILENT.get())
    try:
        yield
    finally:
        _SILENT.reset(before)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False, quiet=_SILENT.get())


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------------------------ shard log
# Output per finished shard: the progress bar moves, and a log gets a line of JSON, which
# `tail -f` can follow during a batch that runs for days.


class ShardWatch:
    """Call it with each card. Losing the log is harmless: the cards have the same figures."""

    def __init__(self, advance: Advance, log: Path, rows: Mapping[str, int] | None = None) -> None:
        """rows: each shard's work in rows, by name; for others, the rows written."""
        self._advance, self._log, self._rows = advance, log, rows or {}

    def __call__(self, card: Card) -> None:
        tokens = int(card.counts.get("output_tokens", 0))
        # Each accepted draft token saved a step of its row, so a row took as many steps as it has other tokens.
        steps = tokens - int(card.counts.get("accepted", 0))
        self._advance(self._rows.get(card.shard, card.rows_in), tokens=tokens, steps=steps, dead=card.rows_dead)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(card.finished)),
            **card.model_dump(include={"stage", "shard", "rows_in", "rows_out", "rows_dead", "seconds", "worker"}),
            **{name: n for name, n in card.counts.items() if not isinstance(n, str)},
        }
        with suppress(OSError), self._log.open("a", encoding="utf-8") as file:  # a full disk stops the job elsewhere
            file.write(json.dumps(line) + "\n")
