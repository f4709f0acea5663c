"""What every backbone must do, run over all of them: a new one is covered once it is registered."""

import math

import pytest
import torch

from owlrec.ctr.backbones import BACKBONES, backbone_class
from owlrec.ctr.backbones.dcnv2 import DCNv2
from owlrec.ctr.backbones.din import DIN
from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape
from owlrec.errors import RecipeError

B, L, E = 6, 4, 5


def shape(knowledge_fields: int = 2) -> InputShape:
    return InputShape(item_fields=2, profile_fields=1, knowledge_fields=knowledge_fields, embed_dim=E)


def inputs(length: int = L, **changes: object) -> BackboneInputs:
    generator = torch.Generator().manual_seed(3)
    values = {
        "target": torch.randn(B, 2, E, generator=generator),
        "profile": torch.randn(B, 1, E, generator=generator),
        "knowledge": torch.randn(B, 2, E, generator=generator),
        "history": torch.randn(B, length, 3, E, generator=generator),
        "mask": torch.arange(length) < torch.tensor([0, 1, 2, 3, 4, 4])[:, None],
    }
    return BackboneInputs(**{**values, **changes})  # type: ignore[arg-type]


def build(name: str, knowledge_fields: int = 2) -> Backbone:
    torch.manual_seed(0)
    return backbone_class(name)(shape(knowledge_fields), hidden_dims=(8, 4), dropout=0.5).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_padding_never_changes_a_score(name: str) -> None:
    given = inputs()
    garbage = torch.where(given.mask[:, :, None, None], given.history, 1e4)
    longer = torch.cat([garbage, torch.full((B, 3, 3, E), -7.0)], dim=1)
    mask = torch.cat([given.mask, torch.zeros(B, 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(build(name)(given), build(name)(inputs(history=longer, mask=mask)))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("part", ["target", "profile", "knowledge", "history"])
def test_every_input_matters(name: str, part: str) -> None:
    given = inputs()
    moved = build(name)(inputs(**{part: getattr(given, part) + 1}))
    changed = moved != build(name)(given)
    assert changed.shape == (B,)
    assert changed[1:].all()
    assert changed[0] == (part != "history")  # the first row's history is empty


@pytest.mark.parametrize("name", BACKBONES)
def test_works_without_knowledge_and_without_profile(name: str) -> None:
    torch.manual_seed(0)
    bare = InputShape(item_fields=2, profile_fields=0, knowledge_fields=0, embed_dim=E)
    model = backbone_class(name)(bare, hidden_dims=(8, 4), dropout=0.0)
    assert model(inputs(profile=torch.empty(B, 0, E), knowledge=None)).isfinite().all()


@pytest.mark.parametrize("name", BACKBONES)
def test_rows_do_not_see_each_other(name: str) -> None:
    given, model = inputs(), build(name)
    part = BackboneInputs(*(getattr(given, f)[2:4] for f in ("target", "history", "mask", "profile", "knowledge")))
    torch.testing.assert_close(model(part), model(given)[2:4])


def test_din_attends_as_written_in_the_paper() -> None:
    model, given = build("din"), inputs()
    assert isinstance(model, DIN)
    weights = model.attention(given)
    torch.testing.assert_close(weights.sum(1), torch.tensor([0.0, 1, 1, 1, 1, 1]))
    q = given.target[3].flatten()
    scores = []
    for behaviour in given.history[3, :3]:
        k = behaviour[:2].flatten()
        first = (
            model.query.weight @ q
            + model.query.bias
            + model.key.weight @ behaviour.flatten()
            + model.product.weight @ (q * k)
        )
        scores.append(model.score(first).item())
    total = sum(math.exp(s) for s in scores)
    assert weights[3].tolist() == pytest.approx([*(math.exp(s) / total for s in scores), 0], abs=1e-6)


def test_dcnv2_crosses_as_written_in_the_paper() -> None:
    model, given = build("dcnv2"), inputs()
    assert isinstance(model, DCNv2)
    row = 3
    mean = given.history[row, :3].mean(0)
    x0 = torch.cat([given.target[row], mean, given.profile[row], given.knowledge[row]]).flatten()  # type: ignore[index]
    x = x0
    for layer in model.cross:
        x = x0 * (layer.weight @ x + layer.bias) + x  # type: ignore[operator, union-attr]
    logit = model.head(torch.cat([x, model.deep(x0)]))
    assert model(given)[row].item() == pytest.approx(logit.item(), abs=1e-5)


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'dcnv2'"):
        backbone_class("dcn2")
