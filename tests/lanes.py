"""`make test` and `make check`: several pytests at once, for two cores.

`make test` is the whole suite. Tests of whole runs and jobs (`e2e`, in two parts) and tests that ask the one cluster
and servers (`main`) wait for processes most of the time, so each leaves the others room. What computes (`beside`),
vLLM's engines among it, gets the processor whenever nobody else wants it (SCHED_IDLE; the lowest priority where the
system knows no such class), in two parts, which have a core each when the others are done. `make check` is what only
computes, in two halves of about the same length.

`python tests/lanes.py ARGUMENTS` passes its arguments to all, --check aside and --coverage, with which lines of
platform/owlrec are counted in every process that they start; `pytest` alone runs everything in one process.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

NO_TEST_CHOSEN = 5  # what pytest ends with where ARGUMENTS leave a lane none
# Threads that wait for each other by spinning take what other lanes need: OpenMP's are to sleep, or to be one.
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}
ALONE = SLEEPING | {"OMP_NUM_THREADS": "1"}
TIMEOUT = "--timeout=1800"  # for a test: three times what one that runs alone may take
ONLY_COMPUTES = "not (ray or vllm or e2e or process)"
MODELS = ("tests/ctr", "tests/cohorts")  # where half of that time goes
# Files of engines alone: to collect them imports vLLM, ten seconds of it.
ENGINES = [path for path in Path("tests").rglob("test_*.py") if "\npytestmark = pytest.mark.vllm" in path.read_text()]
HEADS = tuple(f"tests/e2e/test_{name}.py" for name in ("autoscaling", "resubmission", "whole_cluster"))


def give_way() -> None:
    """Lets every other process go first."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


@dataclass(frozen=True)
class Lane:
    """One pytest."""

    arguments: tuple[str, ...]
    env: dict[str, str]
    first: Callable[[], None] | None = None  # what its process does before anything else


# The first is seen while it runs, the others are printed when they are done.
TEST = (
    Lane(("--lane", "main"), SLEEPING),
    Lane(("--lane", "e2e", *HEADS), SLEEPING),
    Lane(("--lane", "e2e", *(f"--ignore={file}" for file in HEADS)), SLEEPING),
    Lane(("--lane", "beside", *(f"--ignore={folder}" for folder in MODELS)), ALONE, give_way),
    Lane(("--lane", "beside", *MODELS), ALONE, give_way),
)
CHECK = (
    Lane(("-m", ONLY_COMPUTES, *(f"--ignore={path}" for path in (*MODELS, *ENGINES))), ALONE),
    Lane(("-m", ONLY_COMPUTES, *MODELS), ALONE),
)


def main() -> int:
    """Runs the lanes, shows what each printed one after the other; 1 where a test failed or none ran."""
    runner = ["coverage", "run", "-m", "pytest"] if "--coverage" in sys.argv else ["pytest"]
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--check", "--coverage")]
    seen, *behind = CHECK if "--check" in sys.argv else TEST

    def start(lane: Lane, file: int | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *runner, TIMEOUT, *arguments, *lane.arguments]
        return subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | lane.env, preexec_fn=lane.first)

    with ExitStack() as stack:
        printed = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in behind]
        running = [start(lane, file.fileno()) for lane, file in zip(behind, printed, strict=True)]
        running.append(start(seen))
        try:
            codes = {process.wait() for process in reversed(running)}
        finally:
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)  # it ends what its tests have started
                    process.wait()
        for file in printed:
            file.seek(0)
            print(file.read(), flush=True)
    return 0 if codes - {NO_TEST_CHOSEN} == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
