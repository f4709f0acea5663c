"""ReiT in one process: what a step computes, what a run learns, where it stops, and that it can stop anywhere."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]
from torch import Tensor
from toy_taste import toy_examples, toy_texts  # type: ignore[import-not-found]

from owlrec.ctr.trainer import ALONE
from owlrec.errors import EngineError, RecipeError, WorkspaceError
from owlrec.evaluation import auc
from owlrec.ranking.lora import (
    Checkpoint,
    Examples,
    Schedule,
    Tuned,
    TuningProgress,
    answer_logits,
    load_model,
    micro_batches,
    score,
    tokenize,
    tune,
)
from owlrec.ranking.samples import TuningSettings

FAST: dict[str, Any] = {"dtype": "float32", "learning_rate": 0.02, "batch_rows": 16, "micro_tokens": 1024, "epochs": 3}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost a tiny model more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_ranker(tmp_path_factory.mktemp("ranker"), toy_texts())


def tuned(model: str, train: Examples, valid: Examples, config: TuningSettings, **options: Any) -> Tuned:
    return tune(load_model(model, None, config), train, valid, config, **options)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> bool:
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[n], theirs[n], **tolerance) for n in ours)


def test_rows_computed_together_score_as_each_alone(model: str) -> None:
    examples = toy_examples(model, 40)
    assert len(set(examples.lengths.tolist())) == 5
    net = load_model(model, None, TuningSettings(dtype="float32"))
    with torch.no_grad():
        alone = torch.cat([net(torch.tensor(p[None], dtype=torch.int64)).logits[:, -1] for p in examples.prompts])
        together = answer_logits(net, examples.prompts, "cpu")
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    yes, no = examples.answers.yes[0], examples.answers.no[0]
    scores = score(net, examples, 512, ALONE)
    np.testing.assert_allclose(scores, torch.sigmoid(alone[:, yes] - alone[:, no]).numpy(), atol=1e-4)


def test_the_loss_is_that_of_the_answers_token_alone(model: str) -> None:
    examples = toy_examples(model, 16)
    config = TuningSettings(**FAST | {"epochs": 1, "dropout": 0.0})
    net = load_model(model, None, config)
    losses = []
    with torch.no_grad():
        for prompt, target in zip(examples.prompts, examples.targets, strict=True):
            logits = net(torch.tensor(prompt[None], dtype=torch.int64)).logits[0, -1]
            losses.append(-logits.log_softmax(0)[target].item())
    result = tuned(model, examples, toy_examples(model, 20, 1), config)
    assert result.progress.losses[0] == pytest.approx(np.mean(losses), abs=1e-4)


def test_tuning_learns_the_taste_and_leaves_the_model_alone(model: str) -> None:
    config = TuningSettings(**FAST)
    net = load_model(model, None, config)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    valid = toy_examples(model, 60, 1)
    assert auc(valid.labels, score(net, valid, 4096, ALONE)) < 0.8
    result = tune(net, toy_examples(model, 160), valid, config)
    assert result.progress.best_auc > 0.95
    assert result.progress.losses[-1] < 0.5 * result.progress.losses[0]
    after = {name.replace(".base_layer", ""): weight for name, weight in net.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert set(result.weights) == {
        f"base_model.model.model.layers.{layer}.self_attn.{target}.lora_{matrix}.weight"
        for layer in range(2)
        for target in ("q_proj", "v_proj")
        for matrix in "AB"
    }
    assert (result.settings["r"], result.settings["lora_alpha"], result.settings["peft_type"]) == (8, 16, "LORA")


def test_gradients_of_micro_batches_add_up(model: str) -> None:
    train, valid = toy_examples(model, 48), toy_examples(model, 20, 1)
    config = {**FAST, "dropout": 0.0, "epochs": 1}
    whole, parts = (tuned(model, train, valid, TuningSettings(**config | {"micro_tokens": n})) for n in (10**6, 200))
    assert whole.progress.losses == pytest.approx(parts.progress.losses, abs=1e-4)
    assert same(whole.weights, parts.weights, atol=2e-3)


@pytest.mark.parametrize("changed", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}])
def test_number_formats_and_recomputed_activations_change_little(model: str, changed: dict[str, Any]) -> None:
    train, valid = toy_examples(model, 48), toy_examples(model, 20, 1)
    usual, other = (tuned(model, train, valid, TuningSettings(**FAST | {"epochs": 1} | c)) for c in ({}, changed))
    close = 0.1 if "dtype" in changed else 1e-4
    assert other.progress.losses == pytest.approx(usual.progress.losses, rel=close)
    assert all(weight.dtype == torch.float32 for weight in other.weights.values())


@pytest.mark.parametrize("at", [1, 4])
def test_a_run_goes_on_from_any_checkpoint_as_if_it_had_never_stopped(model: str, at: int) -> None:
    train, valid = toy_examples(model, 48), toy_examples(model, 20, 1)
    config = TuningSettings(**FAST | {"checkpoint_steps": 1, "epochs": 2})
    kept: list[bytes] = []
    whole = tuned(model, train, valid, config, keep=lambda c: kept.append(c.to_bytes()))
    assert len(kept) == 6
    seen: list[int] = []
    again = tuned(
        model, train, valid, config, resume=Checkpoint.from_bytes(kept[at]), on_step=lambda p: seen.append(p.step)
    )
    assert seen == list(range(at + 2, 7))
    assert again.progress == whole.progress
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


def test_it_stops_when_valid_no_longer_improves_and_returns_the_best(model: str) -> None:
    train, valid = toy_examples(model, 64), toy_examples(model, 40, 1, flipped=True)  # each step makes valid worse
    config = TuningSettings(**FAST | {"epochs": 9, "evaluations_per_epoch": 4, "patience": 3, "checkpoint_steps": 1})
    kept: list[Checkpoint] = []
    result = tuned(model, train, valid, config, keep=lambda c: kept.append(Checkpoint.from_bytes(c.to_bytes())))
    aucs = dict(result.progress.valid_aucs)
    assert result.progress.step == result.progress.best_step + 3 < 36
    assert aucs[result.progress.best_step] == max(aucs.values()) == result.progress.best_auc
    best = {n.replace(".default", ""): w for n, w in kept[result.progress.best_step - 1].weights.items()}
    assert all(torch.equal(result.weights[name], weight) for name, weight in best.items())


def test_dropout_differs_by_step_and_seed(model: str) -> None:
    train, valid = toy_examples(model, 16), toy_examples(model, 20, 1)
    usual = FAST | {"epochs": 1, "dropout": 0.5}
    first, again, other = (tuned(model, train, valid, TuningSettings(**usual, seed=seed)) for seed in (0, 0, 1))
    assert first.progress == again.progress
    assert not same(first.weights, other.weights)


def test_what_cannot_be_tuned_is_refused(model: str, tmp_path: Any) -> None:
    train, valid = toy_examples(model, 16), toy_examples(model, 20, 1)
    config = TuningSettings(**FAST)
    with pytest.raises(RecipeError, match=r"ranking\.engine: .*nowhere"):
        tuned(model, train, valid, TuningSettings(**FAST, target_modules=("nowhere",)))
    yes_only = Examples(valid.prompts, np.ones(len(valid), dtype=bool), valid.answers)
    with pytest.raises(RecipeError, match="20 of 20 valid rows have the label Yes"):
        tuned(model, train, yes_only, config)
    with pytest.raises(RecipeError, match="tuning: no rows"):
        tuned(model, Examples([], np.zeros(0, dtype=bool), train.answers), valid, config)
    damaged = load_model(model, None, config)
    with torch.no_grad():
        damaged.model.layers[0].mlp.up_proj.weight[0] = float("nan")
    with pytest.raises(RecipeError, match=r"loss of step 1 is nan. Lower ranking.tuning.learning_rate"):
        tune(damaged, train, valid, config)
    with pytest.raises(EngineError, match="cannot be tuned"):
        load_model(str(tmp_path), None, config)


def test_a_prompt_too_long_is_named(model: str) -> None:
    from toy_taste import toy_rows  # type: ignore[import-not-found]

    from owlrec.generation.engines import load_tokenizer

    with pytest.raises(RecipeError, match=r"prompt of user 0 and item 0 has \d+ tokens.* 20 are allowed"):
        tokenize(toy_rows(3), load_tokenizer(model), max_tokens=20)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 300), st.integers(1, 5))
def test_micro_batches_hold_each_row_once_within_the_budget(lengths: list[int], budget: int, workers: int) -> None:
    sizes = np.array(lengths)
    batches = micro_batches(sizes, budget, workers)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(sizes)))
    assert all(len(batch) == 1 or len(batch) * sizes[batch].max() <= budget for batch in batches)
    assert len(batches) >= min(workers, len(sizes))
    longest = [sizes[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 4), st.integers(1, 3))
def test_a_schedule_takes_each_row_once_per_epoch_and_ends_with_an_evaluation(
    n: int, batch: int, epochs: int, evaluations: int
) -> None:
    schedule = Schedule(n, TuningSettings(batch_rows=batch, epochs=epochs, evaluations_per_epoch=evaluations))
    taken = [schedule.rows(step) for step in range(schedule.steps)]
    for epoch in range(epochs):
        rows = np.concatenate(taken[epoch * schedule.steps_per_epoch :][: schedule.steps_per_epoch])
        assert sorted(rows.tolist()) == list(range(n))
    assert schedule.steps in schedule.evaluations
    assert min(schedule.evaluations) >= 1
    rates = [schedule.learning_rate(step) for step in range(schedule.steps)]
    assert max(rates) <= TuningSettings().learning_rate
    assert min(rates) > 0
    peak = int(np.argmax(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_damaged_and_foreign_checkpoints_are_refused(model: str) -> None:
    kept: list[bytes] = []
    train, valid = toy_examples(model, 16), toy_examples(model, 20, 1)
    tuned(model, train, valid, TuningSettings(**FAST | {"epochs": 1}), keep=lambda c: kept.append(c.to_bytes()))
    good = kept[-1]
    for bad in (good[:-9], good[: len(good) // 2], b"", b"not a checkpoint", good.replace(b'"1"', b'"9"')):
        with pytest.raises(WorkspaceError, match="checkpoint is damaged"):
            Checkpoint.from_bytes(bad)
    with pytest.raises(WorkspaceError, match="another adapter"):
        tuned(model, train, valid, TuningSettings(**FAST, rank=4), resume=Checkpoint.from_bytes(good))


def test_progress_counts_stale_evaluations() -> None:
    progress = TuningProgress().after_step(1.0).after_evaluation(0.6).after_step(0.9).after_evaluation(0.6)
    assert (progress.step, progress.losses, progress.stale) == (2, (1.0, 0.9), 1)  # as good is no better
    assert (progress.best_auc, progress.best_step) == (0.6, 1)
    assert progress.after_evaluation(0.7).stale == 0
