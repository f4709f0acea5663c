"""Copies of erased files go from a node's cache as soon as nobody has them open, whatever version they are."""

from pathlib import Path

import pytest

from owlrec.erasure.forget import ErasedCopies, write_copies
from owlrec.machine import NodeCache
from owlrec.workspace import TOMBSTONES, Workspace


def test_open_copies_are_evicted_later(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWLREC_CACHE", str(tmp_path))
    NodeCache.default.cache_clear()
    workspace = Workspace(s3_root)
    copies = ErasedCopies(workspace)
    for content in (b"old", b"new"):
        workspace.write_bytes("a.bin", content)
        opened = workspace.local_copy("a.bin")
        if content == b"old":
            opened.close()
    workspace.write_bytes("b.bin", b"other")
    workspace.local_copy("b.bin").close()
    contents = lambda: sorted(f.read_bytes() for f in (tmp_path / "files").iterdir() if f.suffix != ".lock")  # noqa: E731
    assert copies.evict() == 0
    assert contents() == [b"new", b"old", b"other"]
    write_copies(workspace, f"{TOMBSTONES}/run", ["a.bin", "c.bin"])
    assert copies.evict() == 1
    assert contents() == [b"new", b"other"]
    opened.close()
    assert copies.evict() == 0
    assert contents() == [b"other"]
    NodeCache.default.cache_clear()
