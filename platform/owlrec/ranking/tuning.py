"""Tunes a LoRA adapter to answer Yes or No (ReiT; ReLLa, WWW 2024), in one process or in several torch.distributed
ones; does not depend on Ray.

Each step depends only on the seed and its number: its rows, their distribution over workers, and
dropout. So a killed run resumes from its last checkpoint with exactly the same results. The rows
of a step are computed in order of length, as many at a time as fit `micro_tokens`, with the vocabulary's logits at only
the position that the loss sees: they would cost more than the layers of a small model. Workers sum their gradients
once per step, which equals the result of one worker, however unevenly the rows are distributed.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from owlrec.config import Config
from owlrec.ctr.trainer import ALONE, Worker, metadata_of
from owlrec.errors import EngineError, RecipeError, WorkspaceError
from owlrec.evaluation import auc
from owlrec.generation.models import render_chat
from owlrec.process import cache_folder
from owlrec.prompting.ranking import YES
from owlrec.ranking.experiment import TuningSettings
from owlrec.ranking.scorer import TEMPLATE_OPTIONS, Answers, find_answers, likely_answers
from owlrec.storage import Storage
from owlrec.workspace import Workspace

# ------------------------------------------------------------------------------------------------------------- examples
# Tuning rows as token ids: prompts that end where the answer begins, and the one expected next token.
#
# The loss sees only that token. The end of the turn, shared by all answers, would be learned in a few steps and
# then halve the weight of Yes and No.


@dataclass(frozen=True)
class Examples:
    """Rows for tuning or evaluation."""

    prompts: list[np.ndarray]  # int32, each of its own length
    labels: np.ndarray  # bool [n]: whether the answer is Yes
    answers: Answers  # one token per answer

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]: tokens of each prompt."""
        return np.array([len(prompt) for prompt in self.prompts], dtype=np.int64)

    @property
    def targets(self) -> np.ndarray:
        """int64 [n]: expected next token of each prompt."""
        return np.where(self.labels, self.answers.yes[0], self.answers.no[0])


def tokenize(rows: pa.Table, tokenizer: Any, *, max_tokens: int) -> Examples:
    """The rows (samples.TUNING_ROWS) in the model's chat template.

    Raises EngineError if the first token does not separate Yes and No, and RecipeError if a prompt is longer than
    `max_tokens`.
    """
    answers = likely_answers(tokenizer, find_answers(tokenizer))
    prompts = []
    for row in rows.select(["user_id", "item_id", "system", "text"]).to_pylist():
        ids = render_chat(tokenizer, row["system"], row["text"], TEMPLATE_OPTIONS)
        if len(ids) > max_tokens:
            raise RecipeError(
                f"ranking: the prompt of user {row['user_id']} and item {row['item_id']} has {len(ids)} "
                f"tokens, but at most {max_tokens} are allowed. Lower ranking.data.behaviors, which "
                "drops the oldest."
            )
        prompts.append(np.array(ids, dtype=np.int32))
    labels = np.array([answer == YES for answer in rows["answer"].to_pylist()], dtype=bool)
    return Examples(prompts, labels, answers)


# ---------------------------------------------------------------------------------------------------------- checkpoints
# Checkpoint of a tuning run as one safetensors file: adapter, optimizer, the best adapter so far, and the counts.
#
# It is one file, so a reader never sees the adapter of one step with the optimizer of another. Everything else depends
# on the seed and the step (see `tuning`).


_VERSION = "1"


class Progress(Config):
    """Work done so far."""

    step: int = 0
    losses: tuple[float, ...] = ()  # per step
    valid_aucs: tuple[tuple[int, float], ...] = ()  # step, AUC
    best_auc: float = -1.0
    best_step: int = 0
    stale: int = 0  # evaluations since the best

    def after_step(self, loss: float) -> "Progress":
        """One step later."""
        return self.model_copy(update={"step": self.step + 1, "losses": (*self.losses, loss)})

    def after_evaluation(self, auc: float) -> "Progress":
        """With one more AUC on the valid split."""
        changes = {"valid_aucs": (*self.valid_aucs, (self.step, auc))}
        if auc > self.best_auc:
            return self.model_copy(update={**changes, "best_auc": auc, "best_step": self.step, "stale": 0})
        return self.model_copy(update={**changes, "stale": self.stale + 1})


@dataclass(frozen=True)
class Checkpoint:
    """All tensors by the names of the adapter's weights."""

    progress: Progress
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]  # AdamW's exp_avg and exp_avg_sq
    best: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, progress: Progress, weights: Mapping[str, Tensor], optimizer: Optimizer, best: Mapping[str, Tensor]
    ) -> "Checkpoint":
        """Checkpoint of a running optimizer."""
        moments = {
            kind: {name: optimizer.state[weight][kind] for name, weight in weights.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        return cls(progress, dict(weights), moments, dict(best))

    def restore(self, weights: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Restores weights and moments. Raises WorkspaceError if the adapter has another shape."""
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        if shapes != {name: tuple(weight.shape) for name, weight in self.weights.items()}:
            raise WorkspaceError(
                "the checkpoint belongs to another adapter (different modules, rank or model). Delete it to "
                "restart tuning."
            )
        for name, weight in weights.items():
            weight.data.copy_(self.weights[name])
            state: dict[str, Any] = optimizer.state[weight]
            state["step"] = weight.new_tensor(float(self.progress.step), device="cpu")
            for kind, tensors in self.moments.items():
                state[kind] = tensors[name].to(weight.device, weight.dtype).clone()

    def to_bytes(self) -> bytes:
        """The file's contents."""
        groups = {"weights": self.weights, "best": self.best, **self.moments}
        tensors = {
            f"{group}/{n}": t.detach().cpu().contiguous() for group, named in groups.items() for n, t in named.items()
        }
        return save(tensors, {"version": _VERSION, "progress": self.progress.model_dump_json()})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Checkpoint":
        """Parses the output of `to_bytes`. Raises WorkspaceError if it is damaged or has another version."""
        try:
            about = metadata_of(data)
            if about["version"] != _VERSION:
                raise ValueError(f"it has version {about['version']}")
            groups: dict[str, dict[str, Tensor]] = {g: {} for g in ("weights", "best", "exp_avg", "exp_avg_sq")}
            for path, tensor in load(data).items():
                group, _, name = path.partition("/")
                groups[group][name] = tensor
            progress = Progress.model_validate_json(about["progress"])
        except (SafetensorError, ValidationError, KeyError, ValueError) as error:
            raise WorkspaceError(f"the checkpoint is damaged ({error}). Delete it to restart tuning.") from None
        moments = {kind: groups[kind] for kind in ("exp_avg", "exp_avg_sq")}
        return cls(progress, groups["weights"], moments, groups["best"])


# ------------------------------------------------------------------------------------------------------------- adapters
# A tuned adapter on disk: the folder that peft and vLLM load directly, plus a manifest of its purpose.
#
#     adapter_config.json, adapter_model.safetensors    as peft writes them
#     ranker.json                                       model, wording and settings; written last
#
# vLLM loads any model's adapter into any model of the same shape, and a prompt with another wording scores
# without an error; both are checked against ranker.json.


_FILES = ("adapter_config.json", "adapter_model.safetensors")


class RankerManifest(BaseModel):
    """Purpose and results of an adapter's tuning."""

    model: str  # its identity (generation.models.model_identity)
    wording: str  # prompting.rella.rank_fingerprint
    rank: int
    progress: Progress
    sha256: str  # of the weights


@dataclass(frozen=True)
class Adapter:
    """A verified adapter on a local disk."""

    folder: str
    manifest: RankerManifest


def save_adapter(
    workspace: Workspace,
    folder: str,
    weights: bytes,
    settings: Mapping[str, Any],
    *,
    model: str,
    wording: str,
    progress: Progress,
) -> None:
    """Writes the folder. weights: a safetensors file; settings: peft's; model, wording: see RankerManifest."""
    workspace.write_json(f"{folder}/{_FILES[0]}", dict(settings))
    workspace.write_bytes(f"{folder}/{_FILES[1]}", weights)
    manifest = RankerManifest(
        model=model,
        wording=wording,
        rank=settings["r"],
        progress=progress,
        sha256=hashlib.sha256(weights).hexdigest(),
    )
    workspace.write_json(f"{folder}/ranker.json", manifest.model_dump(mode="json"))


def open_adapter(workspace: Workspace, folder: str, *, model: str, wording: str) -> Adapter:
    """Opens the folder of `save_adapter` on a local disk, copied into OwlRec's cache from an object store.

    Raises WorkspaceError if it is missing or damaged, and EngineError if it was tuned for another model or wording.
    """
    where = workspace.path(folder)
    about = workspace.read_json(f"{folder}/ranker.json")
    weights = workspace.read_bytes(f"{folder}/{_FILES[1]}")
    try:
        manifest = RankerManifest.model_validate(about)
        if manifest.sha256 != hashlib.sha256(weights).hexdigest():
            raise ValueError("its weights do not match their checksum")
    except ValidationError as error:
        raise WorkspaceError(f"{where}/ranker.json is damaged ({error.errors()[0]['msg']}). Tune again.") from None
    except ValueError as error:
        raise WorkspaceError(f"{where} is damaged: {error}. Delete the folder and tune again.") from None
    if manifest.model != model:
        raise EngineError(
            f"{where} is an adapter for {manifest.model}, but the ranker's model is {model}. Use the model it "
            "was tuned for, or tune one for this model."
        )
    if manifest.wording != wording:
        raise EngineError(
            f"{where} was tuned on prompts with a different wording ({manifest.wording[:8]}, not {wording[:8]}). Use "
            "the retrieved_for, behaviors and scenario of tuning, or tune again."
        )
    if workspace.local:
        return Adapter(where, manifest)
    local = cache_folder("adapters", manifest.sha256[:16])
    for name in _FILES:
        if not (local / name).exists():
            Storage(local).write_bytes(name, workspace.read_bytes(f"{folder}/{name}"))
    return Adapter(str(local), manifest)


# --------------------------------------------------------------------------------------------------------------- tuning


# With beta2 = 0.999 the second moment of a hundred-step run would still remember the first step.
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Tuned:
    """weights: from the best evaluation, by peft's names; settings: of the adapter, in peft's format."""

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    progress: Progress


def tune(
    model: Any,
    train: Examples,
    valid: Examples,
    config: TuningSettings,
    worker: Worker = ALONE,
    *,
    resume: Checkpoint | None = None,
    on_step: Callable[[Progress], None] | None = None,
    keep: Callable[[Checkpoint], None] | None = None,
) -> Tuned:
    """Tunes to the best AUC on `valid`. If world_size exceeds 1, every rank of the process group must call it.

    model: a causal LM of transformers, whose own weights do not change. resume: checkpoint of an earlier call with the
    same arguments. on_step, keep: called by rank 0, after each step and with each checkpoint. Raises RecipeError if
    the loss is not a number, `valid` has only one class, or the model has no such modules.
    """
    refuse_unusable(train, valid)
    torch.manual_seed(config.seed)
    peft_model = _adapt(model, config).to(worker.device)
    weights = {name: weight for name, weight in peft_model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), config.learning_rate, betas=_BETAS, weight_decay=0.0)
    progress, best = Progress(), {name: weight.detach().clone() for name, weight in weights.items()}
    if resume is not None:
        progress = resume.progress
        resume.restore(weights, optimizer)
        best = {name: tensor.to(worker.device) for name, tensor in resume.best.items()}
    schedule = Schedule(len(train), config)
    while progress.step < schedule.steps and progress.stale < config.patience:
        loss = _step(peft_model, weights, optimizer, train, schedule, progress.step, config, worker)
        progress = progress.after_step(loss)
        if progress.step in schedule.evaluations:
            valid_auc = auc(valid.labels, score(peft_model, valid, config.micro_tokens, worker))
            if valid_auc > progress.best_auc:
                best = {name: weight.detach().clone() for name, weight in weights.items()}
            progress = progress.after_evaluation(valid_auc)
        due = progress.step in schedule.evaluations or progress.step % config.checkpoint_steps == 0
        if worker.rank == 0:
            if keep and due:
                keep(Checkpoint.of(progress, weights, optimizer, best))
            if on_step:
                on_step(progress)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(best[name])
    return Tuned(*_export(peft_model), progress)


def load_model(folder: str, revision: str | None, config: TuningSettings) -> Any:
    """Loads the transformers model for tuning. Raises EngineError if it cannot be loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, revision=revision, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(
            f"{folder} cannot be tuned: {error}. Use an unquantized causal LM that transformers can load."
        ) from None
    if config.dtype == "bfloat16" and not config.use_gpu and model.config._attn_implementation == "sdpa":
        from owlrec.ranking import attention

        model.set_attn_implementation(attention.NAME)
    return model


class Schedule:
    """Rows of each step, its learning rate, and the steps with an evaluation."""

    def __init__(self, n_rows: int, config: TuningSettings) -> None:
        self.n_rows, self.config = n_rows, config
        self.steps_per_epoch = -(-n_rows // config.batch_rows)
        self.steps = self.steps_per_epoch * config.epochs
        times = config.evaluations_per_epoch * config.epochs
        self.evaluations = {-(-self.steps * (i + 1) // times) for i in range(times)}

    def rows(self, step: int) -> np.ndarray:
        """int64: rows of a step; an epoch's last step has the rest."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(self.n_rows)
        return order[place * self.config.batch_rows :][: self.config.batch_rows]

    def learning_rate(self, step: int) -> float:
        """Rises linearly to the maximum, then falls linearly to 0, reached one step after the last."""
        warmup = int(self.config.warmup_share * self.steps)
        share = (step + 1) / warmup if step < warmup else (self.steps - step) / (self.steps - warmup)
        return self.config.learning_rate * share


def micro_batches(lengths: np.ndarray, micro_tokens: int, world_size: int) -> list[np.ndarray]:
    """Splits rows into batches of similar length: positions in `lengths`, the longest first.

    Each has at most `micro_tokens` once padded, or one row; every worker gets one if there are enough rows.
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

    Padding is on the right, where a causal model's real positions do not see it: no mask is needed, and attention
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
    """float64 [n]: probability of Yes against No after each prompt, on every rank; each computes its share."""
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
    """Raises RecipeError if there are no rows to tune on, or no usable rows to evaluate."""
    if len(train) == 0:
        raise RecipeError("tuning: no rows are left to tune on. Add titles to the items, or raise ranking.data.shots.")
    if len(valid) == 0 or valid.labels.all() or not valid.labels.any():
        raise RecipeError(
            f"tuning: {int(valid.labels.sum())} of {len(valid)} valid rows have the label Yes, so there is no "
            "AUC for early stopping. Prepare more users."
        )


def _step(
    model: Any,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    train: Examples,
    schedule: Schedule,
    step: int,
    config: TuningSettings,
    worker: Worker,
) -> float:
    """One step; the mean loss of its rows."""
    rows = schedule.rows(step)
    targets = torch.from_numpy(train.targets[rows]).to(worker.device)
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, worker.rank]).generate_state(1)[0]))
    model.train()
    optimizer.zero_grad()
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
            f"{config.learning_rate:g}); if this is the first step, the model's weights are damaged."
        )
    for weight, gradient in zip(weights.values(), gradients, strict=True):
        weight.grad = gradient
    torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate(step)
    optimizer.step()
    return float(total)


def _adapt(model: Any, config: TuningSettings) -> Any:
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
        raise RecipeError(
            f"ranking.engine: the model has no {' and '.join(config.target_modules)} for LoRA. Use another. ({error})"
        ) from None


def _export(peft_model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from peft import get_peft_model_state_dict

    weights = {name: w.detach().float().cpu().contiguous() for name, w in get_peft_model_state_dict(peft_model).items()}
    settings = peft_model.peft_config["default"].to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    return weights, plain | {"inference_mode": True, "base_model_name_or_path": None}
