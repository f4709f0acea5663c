"""How soon a job of 10^5 shards that are done but one knows it and starts its engine, on an object store.

The store is moto's S3 server over real HTTP, in a process of its own that is filled from within: no upload is measured.
It lists in time of all its keys a page, so that S3 itself takes a small part of that: requests are counted, too.

    python -m benchmarks.resume                  # 10^5 shards, some three minutes
    python -m benchmarks.resume --shards 1e4
"""

import hashlib
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from benchmarks.table import Figure, options_parser, show
from owlrec.runner import Result, Stage, Work, run_stage
from owlrec.shards import Artifact, Card, Shard
from owlrec.storage import Entry, FileEntry
from owlrec.workspace import Workspace

_BUCKET, _FOLDER, _MADE_OF = "owlrec", "knowledge/f", "d" * 64
_DATA = bytes(100)
_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


def main() -> None:
    """Fills the store, runs the job once and says when its stage was opened."""
    parser = options_parser(__doc__)
    parser.add_argument("--shards", type=float, default=1e5)
    options = parser.parse_args()
    shards = int(options.shards)
    with filled_server(shards - 1) as asked:
        workspace, stage = Workspace(f"s3://{_BUCKET}/ws"), _Opened()
        start = time.time()
        cards = run_stage(workspace, stage, {Shard("user", n): _MADE_OF for n in range(shards)})
        end = time.time()
        requests = Counter(dict(asked))
    assert stage.made == [Shard("user", shards - 1)]
    assert len(cards) == shards
    figures = [
        Figure(measure="until the engine starts", method="time", value=round(stage.opened - start, 1), unit="s"),
        Figure(measure="until the job has ended", method="time", value=round(end - start, 1), unit="s"),
        *(
            Figure(measure="whole job", method=f"{method} requests", value=n, unit="")
            for method, n in sorted(requests.items())
        ),
    ]
    show(f"{shards:,} shards of which one is pending", figures, options)


class _Opened(Stage):
    """Notes when it is opened, where an engine would start, and what it is asked for."""

    name, folder = "generate", _FOLDER

    def __init__(self) -> None:
        self.opened, self.made = 0.0, list[Shard]()

    def open(self, workspace: Workspace, worker: str) -> None:
        self.opened = time.time()

    def run(self, work: Work) -> Result:
        self.made.append(work.shard)
        path = work.shard.file()
        return Result({path: work.workspace.write_bytes(work.artifact.path(path), _DATA)})


@contextmanager
def filled_server(n_shards: int) -> Iterator[Mapping[str, int]]:
    """A server whose bucket holds so many finished shards, named by the environment; its requests by HTTP method."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        asked, ready = manager.dict(), manager.Queue()
        server = context.Process(target=_serve, args=(n_shards, asked, ready), daemon=True)
        server.start()
        before = dict(os.environ)
        os.environ.update(_ENVIRONMENT, AWS_ENDPOINT_URL=ready.get())
        try:
            yield asked
        finally:
            os.environ.clear()
            os.environ.update(before)
            server.terminate()
            server.join()


def _serve(n_shards: int, asked: Any, ready: Any) -> None:
    import logging

    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ.update(_ENVIRONMENT)
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket(_BUCKET, _ENVIRONMENT["AWS_REGION"])
    _fill(_Backend(backend), n_shards)
    handle = WSGIRequestHandler.run_wsgi

    def counted(self: WSGIRequestHandler) -> None:
        asked[self.command] = asked.get(self.command, 0) + 1
        handle(self)

    WSGIRequestHandler.run_wsgi = counted  # type: ignore[method-assign]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    ready.put(f"http://{host}:{port}")
    while True:
        time.sleep(60)


def _fill(workspace: "_Backend", n_shards: int) -> None:
    """As a job has left them: files, cards, and full thousands of cards gathered."""
    artifact, cards = Artifact(workspace, _FOLDER), {}  # type: ignore[arg-type]
    for number in range(n_shards):
        shard = Shard("user", number)
        entry = workspace.write_bytes(artifact.path(shard.file()), _DATA)
        card = Card(stage="generate", shard=shard.name, fingerprint=_MADE_OF, files={shard.file(): entry})
        cards[shard.name] = card
        artifact.finish(card)
    artifact.gather(cards)


class _Backend:
    """The part of a workspace that cards are written through, over the server's own memory."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._written: dict[str, tuple[bytes, Entry]] = {}
        self._folders: dict[str, dict[str, Entry]] = {}

    def write_bytes(self, path: str, data: bytes) -> FileEntry:
        self._backend.put_object(_BUCKET, f"ws/{path}", data)
        entry = Entry(len(data), f'"{hashlib.md5(data).hexdigest()}"')  # what S3 says of a small object
        self._written[path] = data, entry
        folder, _, name = path.rpartition("/")
        self._folders.setdefault(folder, {})[name] = entry
        return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), e_tag=entry.e_tag)

    def entries(self, *parts: str) -> dict[str, Entry]:
        return self._folders["/".join(parts)]

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        data, entry = self._written[path]
        return data, entry.e_tag

    def read_bytes(self, path: str) -> bytes:
        return self._written[path][0] if path in self._written else b""


if __name__ == "__main__":
    main()
