"""What a handful of failures means, and what a refresh drafts from."""

from collections.abc import Sequence

import pytest

from owlrec.decoding import DecodingConfig
from owlrec.generation import EchoEngineConfig, VllmEngineConfig
from owlrec.generation.job import GenerateConfig
from owlrec.shards import Card
from owlrec.streaming import asking
from owlrec.streaming.asking import too_many_dead, with_latest_pools
from owlrec.workspace import Workspace


def cards(*shards: tuple[int, int]) -> Sequence[Card]:
    return [
        Card(stage="refresh", fingerprint="", rows_in=rows, rows_dead=dead, rows_out=rows - dead)
        for rows, dead in shards
    ]


@pytest.mark.parametrize(
    ("shards", "too_many"),
    [
        ([], False),
        ([(1, 1)], False),
        ([(5, 5), (5, 5)], False),  # of ten rows a share says nothing
        ([(6, 6), (5, 5)], True),
        ([(1000, 11)], False),
        ([(300, 11), (250, 0)], False),
        ([(300, 11), (249, 0)], True),
    ],
)
def test_when_failures_are_too_many(shards: list[tuple[int, int]], too_many: bool) -> None:
    assert too_many_dead(cards(*shards), GenerateConfig(max_dead_share=0.02)) == too_many


def test_drafts_come_from_the_newest_release_that_has_pools(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "pointer_history", lambda _: ["full", "delta"])
    monkeypatch.setattr(asking, "find_pools", lambda _, name, identity: ("/pools" if name == "full" else None, ""))
    vllm, on = VllmEngineConfig(type="vllm", model="m"), DecodingConfig(mode="strict")
    assert with_latest_pools(workspace, vllm, on).pools == "/pools"
    named = DecodingConfig(mode="strict", pools="/mine")
    assert with_latest_pools(workspace, vllm, named) == named
    assert with_latest_pools(workspace, EchoEngineConfig(type="echo"), on) == on
    assert with_latest_pools(workspace, vllm, DecodingConfig(mode="off")).pools is None
