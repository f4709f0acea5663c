"""Runs every benchmark and renders benchmarks/RESULTS.md, the page that README numbers come from."""

import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import benchmarks
from benchmarks.table import Figure
from owlrec.ops.run_report import hardware_line

_NOT_A_BENCHMARK = {
    "__main__",
    "load",
    "planted",
    "ranking_cascade",
    "ranking_peers",
    "serving_processes",
    "serving_rank",
    "table",
}


def main() -> None:
    """Each benchmark runs in a process of its own; one that fails ends the run."""
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in _NOT_A_BENCHMARK)
    page = ["# Results", "", f"`make bench` on {hardware_line()}.", ""]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            file = Path(folder) / f"{name}.json"
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--json", str(file), *sys.argv[1:]], check=True)
            page += [f"## {name}", "", f"`python -m benchmarks.{name}`", "", "| measure | method | value | ratio |"]
            page += ["|---|---|---|---|"]
            for figure in map(Figure.model_validate, json.loads(file.read_text())):
                ratio = f"{figure.ratio:.2f}x {figure.ratio_to}" if figure.ratio is not None else ""
                page.append(f"| {figure.measure} | {figure.method} | {figure.value:,.4g} {figure.unit} | {ratio} |")
            page.append("")
    (Path(benchmarks.__path__[0]) / "RESULTS.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
