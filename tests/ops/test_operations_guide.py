"""Every command in the operations guide is real: its options, its modules, its files."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from owlrec.cli import app

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
FENCED = [line for block in re.findall(r"^```\n(.*?)^```", GUIDE, re.M | re.S) for line in block.splitlines()]
COMMANDS = sorted(
    {c for line in FENCED + re.findall(r"`([^`\n]+)`", GUIDE) for c in re.split(r" \| ", line.split("  #")[0])}
)


def words(command):
    return shlex.split(command.split(" >> ")[0].replace("&", ""))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("owlrec ")])
def test_owlrec_commands_are_understood(command):
    node, rest = typer.main.get_command(app), words(command)[1:]
    while hasattr(node, "commands"):
        node = node.commands[rest.pop(0)]
    node.make_context(node.name, rest)  # raises where an option or argument is unknown


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", GUIDE))))
def test_modules_exist(module):
    assert importlib.util.find_spec(module)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:cluster|serve_apps|docs|pipelines)/[\w/.-]*\w", GUIDE))))
def test_files_exist(path):
    assert (ROOT / path).exists()


def test_links_lead_somewhere():
    anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.+)$", GUIDE, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        file, _, anchor = target.partition("#")
        assert (ROOT / "docs" / file).exists() if file else anchor in anchors


@pytest.mark.parametrize(
    "key", sorted(set(re.findall(r"`(generate|engine|prompts|streaming|quality)\.(?!log)(\w+)`", GUIDE)))
)
def test_recipe_keys_exist(key):
    from owlrec.generation import VllmEngineConfig
    from owlrec.recipe import Recipe

    section, name = key
    config = VllmEngineConfig if section == "engine" else Recipe.model_fields[section].annotation
    assert name in config.model_fields


def test_the_guide_has_what_an_operator_looks_for():
    titles = set(re.findall(r"^## (.+)$", GUIDE, re.M))
    assert {
        "Stuck job", "Poisoned release", "Roll back", "Key rotation", "Cost overrun", "Spot storm", "Disk full",
        "Ray upgrade", "Losing the driver or the head",
    } <= titles  # fmt: skip
    assert len([c for c in COMMANDS if c.startswith("owlrec ")]) > 15
