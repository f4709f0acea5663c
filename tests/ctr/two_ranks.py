"""Two ranks of torch.distributed on this machine, as plain processes: multiprocessing would leave a resource tracker
behind until pytest ends.
"""

import socket
import subprocess
import sys
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
