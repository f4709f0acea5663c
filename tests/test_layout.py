"""`platform/` is a source root: the standard library's module of that name must win everywhere."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_platform_is_no_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not list((ROOT / "platform").glob("*.py"))


@pytest.mark.process
def test_standard_library_platform_wins_from_the_root() -> None:
    code = "import platform; print(platform.system()); import owlrec, pipelines, serve_apps"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "Linux"


def test_a_file_name_and_a_class_name_mean_one_thing() -> None:
    """Entry points are named after what they start."""
    library = [path for path in (ROOT / "platform").rglob("*.py") if path.name != "__init__.py"]
    entries = [*(ROOT / "pipelines").glob("*.py"), *(ROOT / "serve_apps").glob("*.py")]
    files, classes = defaultdict(list), defaultdict(list)
    for path in library:
        files[path.name].append(path)
    for path in [*library, *entries]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(path)
    assert library
    assert {name: places for name, places in {**files, **classes}.items() if len(places) > 1} == {}


def loaded(imports: str, names: str) -> str:
    """Those of some modules (an expression) that a new Python has loaded after `imports`, as a printed list."""
    code = f"import sys; {imports}; print([m for m in {names} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.process
def test_loading_a_recipe_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "vllm", "transformers", "sentence_transformers", "matplotlib", "numba")
    assert loaded("import owlrec.recipe, owlrec.generation", repr(heavy)) == "[]\n"
    assert loaded("import owlrec.recipe", "('pydantic',)") == "['pydantic']\n"


@pytest.mark.process
def test_a_lookup_imports_nothing_that_only_an_extra_brings() -> None:
    modules = "cli, owlrec.client, owlrec.lookup, owlrec.ops.doctor, owlrec.releases.redis, owlrec.serving.keys"
    assert loaded(f"import owlrec.{modules}; from owlrec.errors import _EXTRA_OF", "_EXTRA_OF") == "[]\n"


@pytest.mark.process
def test_the_decoder_imports_neither_ray_nor_owlrec_nor_numba_until_it_drafts() -> None:
    assert loaded("import owlrec_decoding", repr(("ray", "owlrec", "numba", "vllm"))) == "[]\n"
