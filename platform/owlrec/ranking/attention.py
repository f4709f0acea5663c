"""Causal attention for tuning on a CPU, as matrix products row by row.

torch's flash kernel for CPUs (2.13) reaches a tenth of the speed of a bf16 matrix product on cores without
AMX, and takes a third of a tuning step. A prompt has a few hundred tokens: its scores fit a core's cache, so
avoiding to write them gains nothing.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "owlrec_by_rows"  # as a model's attn_implementation


def attend_by_rows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [b, h, t, d], key and value [b, g, t, d] to [b, t, h, d].

    Heads of a group are one product with their shared keys. A mask beyond the causal one (such as a window
    shorter than the prompt) and other special cases go to torch's own kernel.
    """
    plain = attention_mask is None and not dropout and key.shape[2] == query.shape[2] and key.shape == value.shape
    if not plain or kwargs.get("position_bias") is not None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return out, None
    b, h, t, d = query.shape
    g = key.shape[1]
    future = query.new_full((t, t), float("-inf")).triu(1).repeat(h // g, 1)
    query = (query * (d**-0.5 if scaling is None else scaling)).reshape(b, g, -1, d)
    rows = [
        torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)).add_(future), dim=-1), v)
        for q, k, v in zip(query, key, value, strict=True)
    ]
    return torch.stack(rows).view(b, h, t, d).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend_by_rows)
AttentionMaskInterface.register(NAME, sdpa_mask)
