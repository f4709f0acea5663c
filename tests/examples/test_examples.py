"""Every example runs as its docstring says, and shows what it promises."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str) -> str:
    """What the example prints."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    command = [sys.executable, f"examples/{name}.py", *arguments]
    environment = {**os.environ, **paths}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [line for path in EXAMPLES for line in path.read_text().splitlines()]
    return write_tiny_ranker(tmp_path_factory.mktemp("model"), texts)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short_and_says_how_it_is_run(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert f"\n    python examples/{path.name}\n" in (ast.get_docstring(ast.parse(text)) or "")


@pytest.mark.process
def test_only_their_own_vectors_tell_a_torch_model_what_users_like() -> None:
    own, shuffled = map(float, re.findall(r"AUC (\d\.\d+)", run("adaptor_in_torch")))
    assert own > 0.9
    assert shuffled < 0.6


@pytest.mark.process
def test_a_source_of_ones_own_gives_tables() -> None:
    printed = run("custom_source")
    users, items, interactions = (part.splitlines()[1:] for part in printed.strip().split("\n\n"))
    assert [len(users), len(items), len(interactions)] == [3, 3, 4]
    assert "Green tea" in items[1]
    assert interactions[-1].split()[2:] == ["1700003600000", "1.0"]


@pytest.mark.e2e
def test_a_run_in_a_scenario_of_ones_own() -> None:
    printed = run("custom_scenario")
    assert "the food it goes with" in printed
    assert "text='echo-" in printed


@pytest.mark.vllm
def test_drafts_from_ones_own_texts_change_no_answer(model: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.csv"
    texts.write_text("text\nAlien is a film.\nHeat is a film by a director.\n")
    assert "4 of 4 answers identical" in run("decoder_in_vllm", "--model", model, "--texts", str(texts))


@pytest.mark.vllm
def test_candidates_of_a_frame_are_scored_by_what_was_retrieved_for_both(model: str) -> None:
    lines = run("llm_ranking_on_pandas", "--model", model).splitlines()
    scores = [float(row.split()[-1]) for row in lines[-2:]]
    assert 1 > scores[0] >= scores[1] > 0
    (shown,) = (line.removeprefix("shown: ").split(", ") for line in lines if line.startswith("shown: "))
    space, war = ("Alien", "Blade Runner", "The Terminator"), ("Das Boot", "Apocalypse Now", "Platoon")
    assert len(shown) == 3
    assert set(shown) <= {*space, *war}
    assert all(set(shown) & set(films) for films in (space, war))  # each candidate had its turn
