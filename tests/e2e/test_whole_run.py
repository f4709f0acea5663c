"""The `owlrec` command from raw ratings to report: twice, after a kill -9, and with mistakes."""

import json
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import forked
import psutil
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from owlrec.cli import app

pytestmark = pytest.mark.e2e


def knowledge_rows(workspace: Path) -> list[tuple[str, int, int, str]]:
    files = [f for f in workspace.glob("knowledge/*/*/*.parquet") if f.parent.name in ("user", "item")]
    rows = [r for f in files for r in pq.read_table(f, columns=["kind", "id", "as_of", "text"]).to_pylist()]
    return sorted((r["kind"], r["id"], r["as_of"], r["text"]) for r in rows)


def test_run_writes_everything_and_a_second_run_asks_no_llm(
    echo_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = forked.owlrec_run("run", str(echo_recipe), folder=tmp_path)
    assert first.returncode == 0, first.stdout
    workspace = tmp_path / "ws"
    rows = knowledge_rows(workspace)
    assert len(rows) == len({r[:3] for r in rows})
    assert Counter(kind for kind, _ in {r[:2] for r in rows}) == {"user": 60, "item": 120}
    report = next(workspace.glob("reports/*.html")).read_text()
    assert "AUC" in report
    assert "invented words" in report  # who wrote the texts decides what a reader is warned of
    assert "SmolLM2" not in report
    before = {f: f.stat().st_mtime_ns for f in workspace.glob("knowledge/**/*") if f.is_file()}
    second = forked.owlrec_run("run", str(echo_recipe), folder=tmp_path)
    assert second.returncode == 0
    assert "all 12 shards are already done" in second.stdout
    assert {f: f.stat().st_mtime_ns for f in workspace.glob("knowledge/**/*") if f.is_file()} == before
    monkeypatch.chdir(tmp_path)
    looked_up = CliRunner().invoke(app, ["lookup", str(echo_recipe), "user", str(rows[-1][1]), "999999"])
    assert "echo-" in looked_up.stdout
    assert "semantic id " in looked_up.stdout
    assert "<td>knowledge-item</td>" in report
    assert "no knowledge" in looked_up.stdout
    exported = CliRunner().invoke(app, ["ctr", "export", str(echo_recipe), "--trial", "dcnv2/knowledge/seed-0"])
    artifact = exported.stdout.partition("--artifact ")[2].strip()
    assert (workspace / artifact / "model.json").is_file(), exported.stdout
    vectors = CliRunner().invoke(app, ["knowledge", "export-vectors", str(echo_recipe), "--artifact", artifact])
    assert vectors.exit_code == 0, vectors.output
    (folder,) = (workspace / "exports").iterdir()
    for kind in ("user", "item"):
        table = pq.read_table(folder / kind)
        written = sorted({id_ for row_kind, id_, _, _ in rows if row_kind == kind})
        assert sorted(table["id"].to_pylist()) == written
        assert table["raw_id"].to_pylist() == [str(id_) for id_ in table["id"].to_pylist()]
        assert table["semantic_id"].null_count == 0
        assert {len(fields) for fields in table["adaptor_fields"].to_pylist()} != {0}


def test_kill_in_the_middle_loses_and_doubles_no_row(echo_recipe: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    process = forked.owlrec("run", str(echo_recipe), "--to", "generate", log=tmp_path / "killed.log")
    deadline = time.monotonic() + 120
    while not list(workspace.glob("knowledge/*/cards/*/*/*.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Ray's reaper ends the cluster of a dead driver; its agents notice only after a minute or two, which nobody here
    # waits for.
    _, alive = psutil.wait_procs(tree, timeout=3)
    for left in alive:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    done = list(workspace.glob("knowledge/*/cards/*/*/*.json"))
    assert 0 < len(done) < 12
    resumed = forked.owlrec_run("run", str(echo_recipe), "--to", "generate", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stdout
    rows = knowledge_rows(workspace)
    assert len(rows) == len({r[:3] for r in rows})
    assert Counter(kind for kind, _ in {r[:2] for r in rows}) == {"user": 60, "item": 120}
    assert f"{12 - len(done)} of 12 shards to do" in resumed.stdout
    manifest = json.loads((workspace / "stages" / "generate.json").read_text())
    assert manifest["counts"]["user_rows_out"] == len(rows) - 120


def test_dry_run_touches_nothing(echo_recipe: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["run", str(echo_recipe), "--dry-run", "--from", "prepare", "--to", "encode"])
    assert ran.exit_code == 0
    assert "would run" in ran.stdout
    assert "publish" not in ran.stdout
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "encode"], "Run `generate` first"),
        (["--from", "enc"], "there is no stage 'enc'"),
        (["--from", "publish", "--to", "prepare"], "comes after"),
        (["--workspace", "/proc/nowhere"], "is not writable"),
        (["--max-replicas", "0"], "generate.replicas: Input should be greater than 0 (found 0)"),
    ],
)
def test_mistakes_end_with_one_line_and_no_traceback(echo_recipe: Path, arguments: list[str], message: str) -> None:
    ran = CliRunner().invoke(app, ["run", str(echo_recipe), *arguments])
    assert ran.exit_code == 1
    assert message in ran.stderr
    assert isinstance(ran.exception, SystemExit)  # which prints no traceback


def test_model_without_tokenizer_is_named_though_it_fails_inside_ray(echo_recipe: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    text = echo_recipe.read_text()
    echo_recipe.write_text(text.replace("{type: echo, latency_s: 0.3}", f"{{type: vllm, model: {model}}}"))
    ran = forked.owlrec_run("run", str(echo_recipe), "--to", "generate", folder=tmp_path)
    assert ran.returncode == 1, ran.stdout
    assert f"error: model folder {model} has no tokenizer" in ran.stdout
    assert "Traceback" not in ran.stdout
    assert not list((tmp_path / "ws").glob("knowledge/**/*.parquet"))
