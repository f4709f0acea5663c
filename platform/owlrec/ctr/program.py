"""A trained model as a `torch.export` program that scores one user's candidates: its runtime needs none of our classes.

It reads the tensors of a `Batch` by their names, the user's part in one row, and what the adaptor made of the
knowledge in place of the knowledge itself; the number of candidates is free. Weights are inside.
"""

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from owlrec.ctr.model import Batch, CTRModel

Program = Callable[[dict[str, Tensor]], Tensor]  # request_tensors -> float64 [n], probabilities


def request_tensors(batch: Batch) -> dict[str, Tensor]:
    """What a program reads of a batch: its tensors by name."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def export_program(model: CTRModel, example: Batch) -> bytes:
    """The program of a model, as `load_program` reads it.

    example: candidates of one user, at least two, adapted where the model has an adaptor; history, ratings and profile
    in one row.
    """
    request = _Request(model).eval()
    tensors = request_tensors(example)
    n = len(example.items)
    candidates = torch.export.Dim("candidates", min=1)
    shapes = {name: {0: candidates} if len(tensor) == n else {} for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its tracing
        program = torch.export.export(request, (tensors,), dynamic_shapes=(shapes,), strict=False)
        file = io.BytesIO()
        torch.export.save(program, file)
    return file.getvalue()


def load_program(data: bytes) -> Program:
    """What `export_program` wrote."""
    module: Program = torch.export.load(io.BytesIO(data)).module()
    return module


class _Request(nn.Module):
    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = copy.copy(model)
        self.model._modules = {**model._modules, "adaptor": None, "code_fields": None}  # what they make is given

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        given: dict[str, Any] = {**tensors}
        logits: Tensor = self.model(Batch(**given))
        return logits.double().sigmoid()
