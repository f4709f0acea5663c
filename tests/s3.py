"""An S3 server on loopback, in this process: moto's, over real HTTP."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """The address of a new, empty bucket's server, which the environment names for the block."""
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    try:
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield f"http://{host}:{port}"
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


@contextmanager
def s3_process(bucket: str) -> Iterator[str]:
    """The same server as a process of its own: whole runs ask it thousands of times."""
    import subprocess
    import sys
    import time

    import boto3
    from processes import free_port

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    try:
        for attempt in range(120):
            try:
                boto3.client("s3").create_bucket(Bucket=bucket)
                break
            except Exception:
                if attempt == 119:
                    raise
                time.sleep(0.5)
        yield os.environ["AWS_ENDPOINT_URL"]
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.terminate()
        server.wait()
