"""An S3 server on loopback: moto's, over real HTTP.

It is a process of its own: whole runs ask it thousands of times, and vLLM (0.32) starts no engine in a process that has
Flask, whose proxies it trips over when it looks for its kernels.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from processes import free_port

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """The address of a new, empty bucket's server, which the environment names for the block."""
    import boto3

    address = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", address.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=address)
    try:
        for attempt in range(120):
            try:
                boto3.client("s3").create_bucket(Bucket=bucket)
                break
            except Exception:
                if attempt == 119 or server.poll() is not None:
                    raise
                time.sleep(0.5)
        yield address
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.terminate()
        server.wait()
