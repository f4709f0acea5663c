"""LoRA adapters on vLLM's CPU build, with one product per run of rows that share an adapter. `VllmEngine` installs it.

vLLM 0.32 copies an adapter's matrices once per token before it multiplies, which costs several times a small model's
own layers, and a row without an adapter gets the adapter of the last place (vllm#48421). Here such rows stay
unchanged, and all-zero matrices, as in modules that an adapter does not change, are not multiplied.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Runs = list[tuple[int, int, int]]  # first row, row after the last, place of the adapter


class RunwiseLora(PunicaWrapperCPU):
    """The operations that a step's LoRA layers call."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called before each step whose rows or adapters differ from the previous one's."""
        super().update_metadata(*args, **kwargs)
        self._token_runs, self._sampler_runs = _runs(self.token_lora_indices), _runs(self.sampler_indices)

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        _shrink(y.view(-1, y.shape[-1]), x, w_t_all, scale, self._token_runs)

    def _apply_expand(
        self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int, add_inputs: bool = True
    ) -> None:
        _expand(y[:, y_offset : y_offset + y_slice_size], x, w_t_all, self._token_runs)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y += x @ B."""
        _expand(y, x, lora_b_stacked, self._token_runs)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y += x @ A @ B * scale."""
        x = x.view(-1, x.shape[-1])
        between = torch.zeros(len(x), lora_b_stacked.size(-1), dtype=torch.float32)
        _shrink(between, x, lora_a_stacked, scale, self._sampler_runs)
        _expand(y.view(-1, y.shape[-1]), between, lora_b_stacked, self._sampler_runs)


def _runs(places: Tensor) -> Runs:
    """places: int64 [rows], of each row's adapter; -1 for none."""
    run_places, lengths = torch.unique_consecutive(places, return_counts=True)
    ends = lengths.cumsum(0).tolist()
    runs = zip([0, *ends], ends, run_places.tolist(), strict=False)
    return [run for run in runs if run[2] >= 0]


def _matrix(stacked: Tensor, place: int) -> Tensor | None:
    """stacked: [places, 1, out, in] or [places, out, in]. None if the adapter's matrix is zero."""
    matrix = stacked[place].flatten(0, -2)
    return matrix if matrix.any() else None


def _shrink(y: Tensor, x: Tensor, stacked: Tensor, scale: float, runs: Runs) -> None:
    """y, initially zeros: [rows, rank]; x: [rows, in]."""
    for start, end, place in runs:
        if (a := _matrix(stacked, place)) is not None:
            y[start:end, : len(a)] = scale * (x[start:end].to(y.dtype) @ a.to(y.dtype).T)


def _expand(y: Tensor, x: Tensor, stacked: Tensor, runs: Runs) -> None:
    """Adds to y: [rows, out], from x: [rows, rank]."""
    for start, end, place in runs:
        if (b := _matrix(stacked, place)) is not None:
            wide = min(y.shape[1], len(b))  # vLLM may pad the two differently
            y[start:end, :wide] += x[start:end].to(y.dtype) @ b[:wide].to(y.dtype).T
