"""`make test`: the whole suite on two cores, in three pytests at once.

Tests of whole runs and jobs (`e2e`) and tests that ask the one cluster and servers (`main`) wait for processes half of
the time, so each leaves the other room. What computes (`beside`), vLLM's engines among it, gets the processor whenever
nobody else wants it (SCHED_IDLE; the lowest priority where the system knows no such class).

`python tests/lanes.py ARGUMENTS` passes its arguments to all, --coverage aside, with which lines of platform/owlrec are
counted in every process that they start; `pytest` alone runs everything in one process.
"""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack

BEHIND = ("e2e", "beside")  # printed when they are done; `main` is seen while it runs
NO_TEST_CHOSEN = 5  # what pytest ends with where ARGUMENTS leave a lane none
# Threads that wait for each other by spinning take what other lanes need: OpenMP's are to sleep, or to be one.
ENV = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
ENV_BESIDE = ENV | {"OMP_NUM_THREADS": "1"}
TIMEOUT = "--timeout=1800"  # for a test: three times what one that runs alone may take


def give_way() -> None:
    """Lets every other process go first."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


def main() -> int:
    """Runs the lanes, shows what each printed one after the other; 1 where a test failed or none ran."""
    runner = ["coverage", "run", "-m", "pytest"] if "--coverage" in sys.argv else ["pytest"]
    arguments = [argument for argument in sys.argv[1:] if argument != "--coverage"]
    command = [sys.executable, "-m", *runner, TIMEOUT, *arguments, "--lane"]
    with ExitStack() as stack:
        printed = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in BEHIND]
        e2e, beside = others = [
            subprocess.Popen([*command, lane], stdout=file, stderr=file, env=env, preexec_fn=first)
            for lane, file, env, first in zip(BEHIND, printed, (ENV, ENV_BESIDE), (None, give_way), strict=True)
        ]
        try:
            codes = {subprocess.run([*command, "main"], check=False, env=ENV).returncode, e2e.wait(), beside.wait()}
        finally:
            for lane in others:
                if lane.poll() is None:
                    lane.send_signal(signal.SIGINT)  # it ends what its tests have started
                    lane.wait()
        for file in printed:
            file.seek(0)
            print(file.read(), flush=True)
    return 0 if codes - {NO_TEST_CHOSEN} == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
