"""Two ranks of torch.distributed on this machine, as plain processes: multiprocessing would leave a resource tracker
behind until pytest ends.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def run_two_ranks(script: str, folder: Path) -> None:
    """Runs `script` with rank, port and folder as its arguments, once a rank, and waits for both to end well."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, script, str(rank), str(port), str(folder)]) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def be_a_rank(run: Callable[[int, int, Path], None]) -> None:
    """What a script does that `run_two_ranks` runs."""
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    # Without the interpreter's own end, in which gloo's threads, still there after destroy_process_group, abort the
    # process once in a while ("terminate called without an active exception", torch 2.13).
    os._exit(0)
