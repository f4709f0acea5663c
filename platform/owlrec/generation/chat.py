"""A question as a model's own chat template puts it: token ids that end where the answer begins."""

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from owlrec.generation.engine import RequestRefused


def render_chat(tokenizer: Any, system: str, prompt: str, options: Mapping[str, Any] | None = None) -> list[int]:
    """The token ids of a system turn ("" for the model's own), a user turn and the header of the answer.

    tokenizer: of transformers, or vLLM's. options: of the template, such as enable_thinking. A template that knows no
    system turn (Gemma's and others) gets its text at the head of the user's. Raises RequestRefused where the template
    refuses that too.
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
