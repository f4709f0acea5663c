"""What travels with a submitted job: the recipe, and OwlRec's own code unless the cluster's image has it.

A folder is put together for Ray to upload as the job's working directory, so that a job does not depend on where it was
submitted from, nor carries the data and environments that lie there. Ray names an upload by its contents: the same code
and recipe go over the wire once.
"""

import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from owlrec.errors import RecipeError
from owlrec.recipe import Recipe

RECIPE = "recipe.yaml"
CODE_ROOT = "platform"  # of owlrec in the folder, as in the repository: relative, since it lies elsewhere on each node
_FOR_PACKAGES = shutil.ignore_patterns("__pycache__", "*.pyc")


@contextmanager
def job_folder(recipe: Path | None, packages: Mapping[str, Path]) -> Iterator[Path]:
    """A folder with the recipe (if any) as `recipe.yaml` and each package below its name, removed after the block.

    packages: folder by where it should lie, such as platform/owlrec; empty where the cluster has OwlRec installed.
    """
    with TemporaryDirectory(prefix="owlrec-job-") as name:
        folder = Path(name)
        if recipe is not None:
            shutil.copyfile(recipe, folder / RECIPE)
        for place, package in packages.items():
            shutil.copytree(package, folder / place, ignore=_FOR_PACKAGES)
        yield folder


def refuse_local_paths(recipe: Recipe) -> None:
    """Raises RecipeError for data or a model by a path that only holds in the folder where the job is submitted."""
    values = recipe.model_dump(mode="json")
    named = [(f"source.{key}", value) for key, value in values["source"].items() if key != "type"]  # a source's name
    named += [(f"{key}.model", (values[key] or {}).get("model")) for key in ("engine", "encoder")]
    for setting, path in named:
        if isinstance(path, str) and path and "://" not in path and not os.path.isabs(path) and glob.glob(path):
            raise RecipeError(
                f"{setting}: {path} is a file or folder here, which a job's machines do not have. Give the absolute "
                "path of one that all of them mount, or a URI."
            )


def runtime_env(folder: Path, *, installed: bool, extra: Path | None = None) -> dict[str, Any]:
    """Ray's description of the environment that driver and workers get.

    installed: whether the cluster has OwlRec. extra: a YAML file with further fields (pip, uv, env_vars, …), for
    machines that lack dependencies. Raises RecipeError where that is no such file.
    """
    fields = _read(extra) if extra else {}
    variables = {str(k): str(v) for k, v in (fields.pop("env_vars", None) or {}).items()}
    if not installed:
        # Before any OwlRec that an image may have: code of two versions must not mix.
        variables["PYTHONPATH"] = ":".join([CODE_ROOT, *filter(None, [variables.get("PYTHONPATH")])])
    return {"working_dir": str(folder), **fields} | ({"env_vars": variables} if variables else {})


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(fields, dict) or "working_dir" in fields or not isinstance(fields.get("env_vars") or {}, dict):
        raise RecipeError(
            f"{path}: must hold fields of a Ray runtime environment such as `pip: […]`, and no working_dir, which is "
            "the job's own."
        )
    return fields
