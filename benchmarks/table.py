"""What every benchmark shares: its command line, its table with the hardware first, and its JSON."""

import argparse
import json
from pathlib import Path

from pydantic import BaseModel

from owlrec.ops.console import note, table
from owlrec.ops.report import hardware_line


class Figure(BaseModel):
    """One measured number, and its ratio to a peer of the same run."""

    measure: str
    method: str
    value: float
    unit: str
    ratio_to: str | None = None
    ratio: float | None = None


def options_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser with --quick and --json, the options of every benchmark."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: sooner done, less trustworthy")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def show(title: str, figures: list[Figure], options: argparse.Namespace) -> None:
    """Prints the hardware and the table; writes the JSON file where one is asked for."""
    note(hardware_line() + (", --quick" if options.quick else ""))
    rows = [
        (f.measure, f.method, f.value, f.unit, f"{f.ratio:.2f}x {f.ratio_to}" if f.ratio is not None else "")
        for f in figures
    ]
    table(title, ["measure", "method", "value", "unit", "ratio"], rows)
    if options.json:
        options.json.write_text(json.dumps([f.model_dump() for f in figures], indent=2))
