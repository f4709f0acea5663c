"""Attention for tuning on a CPU: torch's values and gradients, and torch's own kernel where it is not plain."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from owlrec.ranking import lora
from owlrec.ranking.lora import answer_logits, load_model
from owlrec.ranking.samples import TuningSettings


def tensors(heads: int, groups: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((3, heads, 11, 8), (3, groups, 11, 8), (3, groups, 11, 8))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def both(heads: int, groups: int, dtype: torch.dtype = torch.float32, **options: Any) -> list[list[torch.Tensor]]:
    """The outputs, and the gradients of query, key and value, of ours and of torch's."""
    module: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    outputs = []
    for attend in (lora.attend_by_rows, sdpa_attention_forward):
        inputs = tensors(heads, groups, dtype)
        out = attend(module, *inputs, **{"attention_mask": None, **options})[0]
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        (out * weights).sum().backward()
        outputs.append([out, *(tensor.grad for tensor in inputs)])
    return outputs


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.7}])
def test_same_values_and_gradients_as_torch(heads: int, groups: int, options: dict[str, Any]) -> None:
    for ours, theirs in zip(*both(heads, groups, **options), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_it_differs_by_roundings_only() -> None:
    for ours, theirs in zip(*both(6, 2, torch.bfloat16), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_a_window_is_seen() -> None:
    place = torch.arange(11)
    window = (place[:, None] >= place) & (place[:, None] - place < 3)
    masked = both(6, 2, attention_mask=window.expand(3, 1, 11, 11))
    for ours, theirs in zip(*masked, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(masked[0][0], both(6, 2)[0][0])


def test_a_model_in_bfloat16_on_a_cpu_answers_as_with_torchs_attention(tmp_path: Any) -> None:
    folder = write_tiny_ranker(tmp_path, ["some text"])
    ours, exact = (load_model(folder, None, TuningSettings(dtype=dtype)) for dtype in ("bfloat16", "float32"))
    assert ours.config._attn_implementation == lora.BY_ROWS
    assert exact.config._attn_implementation == "sdpa"
    prompts = [torch.arange(3, 3 + n).numpy() % 40 for n in (9, 14, 5)]
    with torch.no_grad():
        by_rows = answer_logits(ours, prompts, "cpu")
        ours.set_attn_implementation("sdpa")
        torch.testing.assert_close(by_rows, answer_logits(ours, prompts, "cpu"), atol=0.1, rtol=0.1)
