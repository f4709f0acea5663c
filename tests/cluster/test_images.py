"""The Dockerfiles: pins that agree with the project's, users, and what the build may see."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from manifests import CLUSTER, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

images = pytest.mark.parametrize("kind", ["cpu", "gpu"])
PYTHON = "3.11"


def instructions(kind: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions and their arguments, continuation lines joined and comments left out."""
    text = (CLUSTER / f"Dockerfile.{kind}").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def argument(kind: str, name: str) -> str:
    return next(r.partition("=")[2].strip('"') for i, r in instructions(kind) if i == "ARG" and r.startswith(name))


@images
def test_stages_and_user(kind: str) -> None:
    steps = instructions(kind)
    stages = [rest for name, rest in steps if name == "FROM"]
    assert stages == ["python:${PYTHON} AS build", "python:${PYTHON}"]
    final = steps[max(i for i, (name, _) in enumerate(steps) if name == "FROM") :]
    assert [rest for name, rest in final if name == "USER"] == ["1000:1000"]
    assert [rest for name, rest in final if name == "COPY"] == ["--from=build /opt/owlrec /opt/owlrec"]
    assert not any(name in ("ADD", "ENTRYPOINT") for name, _ in steps)
    # The user of the image is that of the manifests' pods and of the folders that `ray up` makes.
    assert any("--uid 1000 --gid 1000" in rest for name, rest in final if name == "RUN")


@images
def test_everything_is_pinned(kind: str) -> None:
    assert re.fullmatch(rf"{PYTHON}\.\d+-slim-\w+", argument(kind, "PYTHON"))
    for name, rest in instructions(kind):
        for installed in re.findall(r"pip install ([^&]*)", rest) if name == "RUN" else []:
            words = [
                w
                for w in installed.split()
                if not w.startswith("-") and w not in (f"{kind}.lock", "./platform/owlrec_decoding", ".")
            ]
            words = [w for w in words if not w.startswith("${TORCH_INDEX")]
            assert all("==" in w or w in ("${TORCH}", "${ASSETS}") for w in words), installed


@images
def test_locks_are_exact_hashed_and_agree_with_the_project(kind: str) -> None:
    lock = (ROOT / "requirements" / f"{kind}.lock").read_text()
    exact = dict(re.findall(r"^([a-z0-9._-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE))
    assert len(exact) == len(re.findall("^[^# ]", lock, re.MULTILINE)) > 100
    assert "://" not in lock
    if kind == "cpu":  # the Dockerfile installs these builds before
        exact |= dict(re.findall(r"(\w+)==(\S+)", argument(kind, "TORCH=")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["ray"], *extras["cloud"], *extras[kind], *extras["redis"]]
    decoder = tomllib.loads((ROOT / "platform/owlrec_decoding/pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, [*wanted, *decoder["dependencies"]]):
        if not requirement.name.startswith("owlrec"):
            assert requirement.specifier.contains(exact[canonicalize_name(requirement.name)]), requirement
    assert not {"torchaudio", "torchcodec"} & exact.keys()  # whose import breaks transformers
    assert ("RUN", f"pip install --no-deps --require-hashes -r {kind}.lock") in instructions(kind)


def test_torch_and_the_demos_assets_are_those_of_make_setup() -> None:
    makefile = (ROOT / "Makefile").read_text()
    pins = dict(re.findall(r"^([A-Z_]+) := (.*)$", makefile, re.MULTILINE))
    assert argument("cpu", "TORCH=") == pins["TORCH"]
    assert argument("cpu", "TORCH_INDEX") == pins["TORCH_INDEX"]
    assert argument("cpu", "ASSETS") == ""
    assert f'--build-arg ASSETS="{pins["ASSETS"]}"' in (CLUSTER / "README.md").read_text()


@images
def test_the_build_sees_what_it_copies_and_no_secret_run_or_history(kind: str) -> None:
    ignore = (CLUSTER / f"Dockerfile.{kind}.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = [r.split()[:-1] for i, r in instructions(kind) if i == "COPY" and not r.startswith("--from")]
    assert {name for names in copied for name in names} == allowed
    assert all((ROOT / name).exists() for name in allowed)
    assert not any(fnmatch(name, rule) for name in (".git", ".venv", "runs", "keys.txt") for rule in allowed)


@pytest.mark.process
def test_a_wheel_can_be_built_from_what_the_build_sees(tmp_path: Path) -> None:
    ignore = (CLUSTER / "Dockerfile.cpu.dockerignore").read_text().splitlines()
    for name in (line.removeprefix("!") for line in ignore if line.startswith("!")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist"]
    for project in (tmp_path, tmp_path / "platform/owlrec_decoding"):
        subprocess.run([*build, project], capture_output=True, text=True, check=True)
    decoder, owlrec = (zipfile.ZipFile(wheel).namelist() for wheel in sorted((tmp_path / "dist").glob("*.whl"))[::-1])
    assert {"owlrec/recipe.py", "owlrec/apps/knowledge.py"} <= set(owlrec)
    assert "owlrec_decoding/drafter.py" in decoder


@images
def test_login_shells_find_the_environment(kind: str) -> None:
    """`ray up` runs `bash --login`, and /etc/profile sets PATH anew."""
    assert any("export PATH=/opt/owlrec/bin:$PATH' > /etc/profile.d/" in rest for _, rest in instructions(kind))
