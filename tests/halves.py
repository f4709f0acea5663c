"""`make test`: the whole suite on two cores in little more than the time of its slower half.

Tests that start clusters, engines and servers mostly wait for processes, and watch the clock. The others only compute,
so they run beside them in a pytest of their own, which gets the processor whenever nobody else wants it (SCHED_IDLE;
the lowest priority where the system knows no such class).

`python tests/halves.py ARGUMENTS` passes its arguments to both; `pytest` alone runs everything in one process.
"""

import os
import signal
import subprocess
import sys
import tempfile

NO_TEST_CHOSEN = 5  # what pytest ends with where ARGUMENTS leave a half none


def give_way() -> None:
    """Lets every other process go first."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


def main() -> int:
    """Runs both halves, shows what each printed one after the other; 1 where a test failed or none ran."""
    command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other are no use beside others
    with tempfile.TemporaryFile("w+") as printed:
        beside = subprocess.Popen(
            [*command, "--half", "beside"], stdout=printed, stderr=printed, env=one_thread, preexec_fn=give_way
        )
        try:
            codes = {subprocess.run([*command, "--half", "main"], check=False).returncode, beside.wait()}
        finally:
            if beside.poll() is None:
                beside.send_signal(signal.SIGINT)  # it ends what its tests have started
                beside.wait()
        printed.seek(0)
        print(printed.read(), flush=True)
    return 0 if codes - {NO_TEST_CHOSEN} == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
