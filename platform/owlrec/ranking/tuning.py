"""Tunes a LoRA adapter to answer Yes or No (ReiT; ReLLa, WWW 2024), on one process or on several that torch.distributed
joins; knows nothing of Ray.

What a step does follows from the seed and its number alone: which rows it takes, how they are dealt to workers, what
dropout drops. So a run that was killed goes on from its last checkpoint exactly as it would have gone on without. Rows
of a step are computed in order of length, as many at a time as fit `micro_tokens`, and the vocabulary's logits at the
one position that the loss sees: they would cost more than the layers of a small model. Workers add up their gradients
once a step, which gives what one worker would have computed, however unevenly the rows fell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from owlrec.ctr.metrics import auc
from owlrec.ctr.worker import ALONE, Worker
from owlrec.errors import EngineError, RecipeError
from owlrec.ranking.checkpoints import Checkpoint, Progress
from owlrec.ranking.examples import Examples
from owlrec.ranking.experiment import TuningConfig

# With beta2 = 0.999 the second moment of a run of a hundred steps still remembers the first.
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Tuned:
    """weights: of the best evaluation, by peft's names; settings: of the adapter, as peft writes them."""

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    progress: Progress


def tune(
    model: Any,
    train: Examples,
    valid: Examples,
    config: TuningConfig,
    worker: Worker = ALONE,
    *,
    resume: Checkpoint | None = None,
    on_step: Callable[[Progress], None] | None = None,
    keep: Callable[[Checkpoint], None] | None = None,
) -> Tuned:
    """Tunes to the best AUC on `valid`. Where world_size exceeds 1, every rank of the process group must call it.

    model: a causal LM of transformers, whose own weights stay as they are. resume: where an earlier call of the same
    arguments stood. on_step, keep: called by rank 0, after each step and with each checkpoint. Raises RecipeError where
    the loss is no number, `valid` has one class only, or the model has no such modules.
    """
    refuse_unusable(train, valid)
    torch.manual_seed(config.seed)
    adapted = _adapt(model, config).to(worker.device)
    weights = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    optimiser = torch.optim.AdamW(weights.values(), config.learning_rate, betas=_BETAS, weight_decay=0.0)
    progress, best = Progress(), {name: weight.detach().clone() for name, weight in weights.items()}
    if resume is not None:
        progress = resume.progress
        resume.restore(weights, optimiser)
        best = {name: tensor.to(worker.device) for name, tensor in resume.best.items()}
    schedule = Schedule(len(train), config)
    while progress.step < schedule.steps and progress.stale < config.patience:
        loss = _step(adapted, weights, optimiser, train, schedule, progress.step, config, worker)
        progress = progress.after_step(loss)
        if progress.step in schedule.evaluations:
            found = auc(valid.labels, score(adapted, valid, config.micro_tokens, worker))
            if found > progress.best_auc:
                best = {name: weight.detach().clone() for name, weight in weights.items()}
            progress = progress.after_evaluation(found)
        due = progress.step in schedule.evaluations or progress.step % config.checkpoint_steps == 0
        if worker.rank == 0:
            if keep and due:
                keep(Checkpoint.of(progress, weights, optimiser, best))
            if on_step:
                on_step(progress)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(best[name])
    return Tuned(*_export(adapted), progress)


def load_model(folder: str, revision: str | None, config: TuningConfig) -> Any:
    """The model of transformers that is tuned. Raises EngineError where it cannot be loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, revision=revision, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(
            f"{folder} cannot be tuned: {error}. Name a causal LM that transformers loads, unquantised."
        ) from None
    if config.dtype == "bfloat16" and not config.use_gpu and model.config._attn_implementation == "sdpa":
        from owlrec.ranking import attention

        model.set_attn_implementation(attention.NAME)
    return model


class Schedule:
    """Which rows each step takes, at what learning rate, and after which steps the model is judged."""

    def __init__(self, n_rows: int, config: TuningConfig) -> None:
        self.n_rows, self.config = n_rows, config
        self.steps_per_epoch = -(-n_rows // config.batch_rows)
        self.steps = self.steps_per_epoch * config.epochs
        times = config.evaluations_per_epoch * config.epochs
        self.evaluations = {-(-self.steps * (i + 1) // times) for i in range(times)}

    def rows(self, step: int) -> np.ndarray:
        """int64: the rows of a step; an epoch's last has what is left."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(self.n_rows)
        return order[place * self.config.batch_rows :][: self.config.batch_rows]

    def learning_rate(self, step: int) -> float:
        """A line up to the highest, then one down to 0, which is reached one step after the last."""
        warmup = int(self.config.warmup_share * self.steps)
        share = (step + 1) / warmup if step < warmup else (self.steps - step) / (self.steps - warmup)
        return self.config.learning_rate * share


def micro_batches(lengths: np.ndarray, micro_tokens: int, world_size: int) -> list[np.ndarray]:
    """Parts rows into batches of similar length: positions in `lengths`, the longest first.

    Each holds at most `micro_tokens` once padded, or one row; there is one for every worker where rows suffice.
    """
    order = np.argsort(-lengths, kind="stable")
    most = max(1, len(order) // world_size)
    batches = []
    while len(order):
        fitting = min(most, max(1, micro_tokens // int(lengths[order[0]])))
        batches.append(order[:fitting])
        order = order[fitting:]
    return batches


def answer_logits(model: Any, prompts: Sequence[np.ndarray], device: str) -> Tensor:
    """float32 [b, vocabulary]: the logits after each prompt.

    Padding stands on the right, where a causal model's real positions do not see it: no mask is needed, and attention
    takes its fastest path.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt)
    ends, place = torch.unique(lengths - 1, return_inverse=True)
    logits = model(input_ids=ids.to(device), logits_to_keep=ends.to(device), use_cache=False).logits
    return logits[torch.arange(len(prompts)), place].float()


def score(model: Any, examples: Examples, micro_tokens: int, worker: Worker) -> np.ndarray:
    """float64 [n]: the probability of Yes against No after each prompt, on every rank; each computes its share."""
    yes_no = [examples.answers.yes[0], examples.answers.no[0]]
    scores = torch.zeros(len(examples), dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for rows in micro_batches(examples.lengths, micro_tokens, worker.world_size)[worker.rank :: worker.world_size]:
            logits = answer_logits(model, [examples.prompts[row] for row in rows], worker.device)[:, yes_no]
            scores[rows] = logits.double().softmax(dim=1)[:, 0].cpu()
    if worker.world_size > 1:
        scores = scores.to(worker.device)
        dist.all_reduce(scores)
    return scores.cpu().numpy()


def refuse_unusable(train: Examples, valid: Examples) -> None:
    """Raises RecipeError where there is nothing to tune on, or nothing to tell a good step from a bad one by."""
    if len(train) == 0:
        raise RecipeError("tuning: no row is left to tune on. Give the items titles, or raise ranking.data.shots.")
    if len(valid) == 0 or valid.labels.all() or not valid.labels.any():
        raise RecipeError(
            f"tuning: {int(valid.labels.sum())} of {len(valid)} valid rows are answered Yes, so no AUC tells when to "
            "stop. Raise ranking.judging.valid_samples."
        )


def _step(
    model: Any,
    weights: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    train: Examples,
    schedule: Schedule,
    step: int,
    config: TuningConfig,
    worker: Worker,
) -> float:
    """One step; the mean loss of its rows."""
    rows = schedule.rows(step)
    targets = torch.from_numpy(train.targets[rows]).to(worker.device)
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, worker.rank]).generate_state(1)[0]))
    model.train()
    optimiser.zero_grad()
    total = torch.zeros(1, device=worker.device)
    for batch in micro_batches(train.lengths[rows], config.micro_tokens, worker.world_size)[
        worker.rank :: worker.world_size
    ]:
        logits = answer_logits(model, [train.prompts[row] for row in rows[batch]], worker.device)
        loss = F.cross_entropy(logits, targets[torch.from_numpy(batch)], reduction="sum") / len(rows)
        loss.backward()
        total += loss.detach()
    gradients = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights.values()]
    if worker.world_size > 1:
        flat = torch.cat([total, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        total, *parts = flat.split([1, *(gradient.numel() for gradient in gradients)])
        gradients = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
    if not torch.isfinite(total):
        raise RecipeError(
            f"tuning: the loss of step {step + 1} is {total.item()}. Lower ranking.tuning.learning_rate (now "
            f"{config.learning_rate:g}); where the first step's is so already, the model's weights are damaged."
        )
    for weight, gradient in zip(weights.values(), gradients, strict=True):
        weight.grad = gradient
    torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm)
    for group in optimiser.param_groups:
        group["lr"] = schedule.learning_rate(step)
    optimiser.step()
    return float(total)


def _adapt(model: Any, config: TuningConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise RecipeError(f"ranking.tuning.target_modules: {error}") from None


def _export(adapted: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from peft import get_peft_model_state_dict

    weights = {name: w.detach().float().cpu().contiguous() for name, w in get_peft_model_state_dict(adapted).items()}
    settings = adapted.peft_config["default"].to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    return weights, plain | {"inference_mode": True, "base_model_name_or_path": None}
