"""Errors that a user can cause and fix: every message names the file, row or key and the next step."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class OwlRecError(Exception):
    """Base of all errors that a user can cause; the CLI prints its message without a traceback."""


class RecipeError(OwlRecError):
    """The recipe file is missing, malformed or refers to something that does not exist."""


class SchemaError(OwlRecError):
    """A table breaks its contract: a missing column, a wrong type, a null or duplicate id, a wrong time unit."""


class SourceError(OwlRecError):
    """Raw data cannot be read: a missing folder, an unknown layout, an unparsable line."""


class WorkspaceError(OwlRecError):
    """The workspace cannot be written, or an artifact that a stage needs does not exist yet."""


class DiskFullError(WorkspaceError):
    """A disk or a quota is full: retrying helps only after somebody frees space."""


class EngineError(OwlRecError):
    """An LLM or encoder cannot be started, or a request to it failed permanently."""


class ReleaseError(OwlRecError):
    """A release is missing, incomplete or corrupt."""


class StoreUnavailableError(OwlRecError):
    """The database behind a store does not respond; retrying later may help."""


class ServingError(OwlRecError):
    """An endpoint must not start with its configuration: no API key off loopback, an unreadable key file."""


class ClusterError(OwlRecError):
    """A Ray cluster cannot be reached, refuses its caller, or cannot run the job as configured."""


class MissingExtraError(OwlRecError):
    """A package is not installed that one of OwlRec's extras brings."""


# Packages by the extra of OwlRec that brings them. Models have two: cpu, or gpu.
_EXTRAS = {
    "ray": "fastapi jinja2 matplotlib owlrec_decoding pandas pyarrow ray starlette uvicorn yaml",
    "cpu": "faiss gguf implicit numba peft safetensors scipy sentence_transformers sklearn torch transformers vllm",
    "cloud": "obstore",
    "redis": "redis",
    "lake": "deltalake pyiceberg",
}
_EXTRA_OF = {package: extra for extra, packages in _EXTRAS.items() for package in packages.split()}


def missing_extra(error: BaseException) -> MissingExtraError | None:
    """What to install, where `error` is that a package of an extra cannot be imported; None for any other error."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if (extra := _EXTRA_OF.get(package)) is None:
        return None
    other = ' (or "owlrec[gpu]" on a GPU)' if extra == "cpu" else ""
    return MissingExtraError(f'this needs {package}, which is not installed. Run: pip install "owlrec[{extra}]"{other}')


@contextmanager
def naming_extras() -> Iterator[None]:
    """Raises MissingExtraError where the block cannot import a package that an extra brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error)) is None:
            raise
        raise missing from None


def root_mistake(error: BaseException | None) -> OwlRecError | None:
    """The OwlRecError behind `error`, however Ray wrapped it in a worker; None if there is none.

    Ray's wrappers may be instances of the error's own class, with a worker's traceback as the message, so this returns
    the innermost one.
    """
    mistake = None
    while error is not None:
        if isinstance(error, OwlRecError):
            mistake = error
        error = getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error.__cause__
    return mistake


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint such as ` Did you mean 'scenario'?` for a mistyped `word`, or the list of valid names."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Valid names: {', '.join(names)}."
