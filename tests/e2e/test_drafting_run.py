"""Two runs with the real model in a bucket: what the first publishes drafts for the second, whose prompts differ a
little."""

import subprocess
import sys
from pathlib import Path

import pytest

from owlrec.generation.job import decoder_counters, read_knowledge
from owlrec.shards import Artifact, finished_stage
from owlrec.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [pytest.mark.e2e, pytest.mark.vllm]


def test_a_release_drafts_for_the_next_generation(tmp_path: Path, s3_root: str) -> None:
    recipe, workspace = tmp_path / "drafting.yaml", Workspace(s3_root)

    def run(history_tokens: int, last: str) -> None:
        recipe.write_text(
            f"""
            name: drafting
            scenario: movies
            workspace: {s3_root}
            source: {{type: movielens-100k, max_users: 8, max_items: 8}}
            shard_rows: 64
            prompts: {{history_tokens: {history_tokens}, mode: both}}
            cohorts: {{mean_size: 4}}
            engine: {{type: vllm, model: smollm2-135m, max_model_len: 512, max_num_seqs: 2, kv_cache_gib: 1,
                      engine_args: {{enforce_eager: true}}}}
            encoder: {{model: hashing}}
            sampling: {{max_tokens: 12}}
            decoding: {{mode: strict}}
            """
        )
        # Not forked: vLLM sets up its threads and kernels for the whole process.
        command = [sys.executable, "-m", "owlrec", "run", str(recipe), "--to", last]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    run(96, "publish")
    run(97, "generate")
    generated = finished_stage(workspace, "generate")
    assert generated is not None
    folder = generated.outputs["knowledge"]
    items, users = (read_knowledge(workspace, folder, kind) for kind in ("item", "user"))
    accepted, tokens = sum(items["accepted"].to_pylist()), sum(items["output_tokens"].to_pylist())
    assert accepted > tokens / 8  # items are asked as before; two rows at a time, so that drafts pay on any machine
    assert accepted <= sum(items["drafted"].to_pylist())
    assert set(items["relaxed"].to_pylist()) == {0}
    decoded = decoder_counters(Artifact(workspace, folder).cards().values())
    assert decoded is not None
    counters = decoded.counts
    assert counters["accepted"] >= accepted + sum(users["accepted"].to_pylist())
    assert counters["hits_own"] > 0
    assert counters["hits_named"] > 0  # cohorts, and the sample of the kind
    assert counters["unknown_pools"] == 0
