"""`make bench`: runs every part of the plan and renders benchmarks/RESULTS.md and the tables of the README.

`python -m benchmarks` runs the full round, meant for 90 minutes on two cores, `python -m benchmarks NAME…` those parts,
the long ones among them, `python -m benchmarks --render` none. Each part runs in a process of its own and keeps its
figures in benchmarks/results/, with command, machine, date and duration; one that fails leaves its earlier figures as
they were, the others still run, and the command then ends with 1.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.pages import RESULTS, Result, render_pages
from benchmarks.plan import LONG_PARTS, PARTS, Part
from owlrec.ops.console import note
from owlrec.ops.report import hardware_line

_EVERY = {part.name: part for part in (*PARTS, *LONG_PARTS)}


def part_named(name: str) -> Part:
    """Raises ArgumentTypeError for a name that the plan does not have."""
    if name not in _EVERY:
        raise argparse.ArgumentTypeError(f"there is no part {name}, but {', '.join(_EVERY)}")
    return _EVERY[name]


def main() -> int:
    """Runs parts, renders the pages; 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", type=part_named, metavar="NAME", help=f"of {', '.join(_EVERY)}")
    parser.add_argument("--render", action="store_true", help="only render the pages from the figures that are there")
    options = parser.parse_args()
    failed = []
    began = time.monotonic()
    for part in () if options.render else options.parts or PARTS:
        note(f"{part.name} ({(time.monotonic() - began) / 60:.0f} min so far)")
        if not run(part):
            failed.append(part.name)
    render_pages()
    if failed:
        note(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run(part: Part) -> bool:
    """Whether the part ran to its end; keeps its figures then."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, "-m", *shlex.split(f"benchmarks.{part.command}"), "--json", str(figures)]
        if subprocess.run(command, check=False).returncode or not figures.exists():
            return False
        result = Result(
            command=f"python -m benchmarks.{part.command}",
            hardware=hardware_line(),
            day=datetime.now(UTC).date().isoformat(),
            seconds=round(time.monotonic() - began),
            figures=json.loads(figures.read_text()),
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{part.name}.json").write_text(result.model_dump_json(indent=1) + "\n")
    return True


if __name__ == "__main__":
    sys.exit(main())
