"""LoRA tuning of the ranker (ReiT; ReLLa, WWW 2024): the training loop, and the Ray Train workers that run it."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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
from owlrec.ctr.training import WorkerSpec, fit_workers, looking_meanwhile, this_worker
from owlrec.errors import EngineError, RecipeError, WorkspaceError, root_mistake
from owlrec.evaluation import auc
from owlrec.generation import VllmEngineConfig
from owlrec.generation.engines import load_tokenizer, model_identity, render_chat, resolve_model
from owlrec.machine import cache_folder, redirect_output
from owlrec.prompting.frameworks import YES
from owlrec.ranking.samples import TuningSettings
from owlrec.ranking.scorer import TEMPLATE_OPTIONS, Answers, find_answers, likely_answers
from owlrec.storage import Storage
from owlrec.workspace import Workspace

# ------------------------------------------------------------------------------------------------------------ attention
# Causal attention for tuning on a CPU, as matrix products row by row.
#
# torch's flash kernel for CPUs (2.13) reaches a tenth of the speed of a bf16 matrix product on cores without
# AMX, and takes a third of a tuning step. A prompt has a few hundred tokens: its scores fit a core's cache, so
# avoiding to write them gains nothing.


BY_ROWS = "owlrec_by_rows"  # as a model's attn_implementation


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
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

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


def register_by_rows() -> str:
    """Makes it known to transformers; its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BY_ROWS, attend_by_rows)
    AttentionMaskInterface.register(BY_ROWS, sdpa_mask)
    return BY_ROWS


# --------------------------------------------------------------------------------------------------------------- tuning
# Tunes a LoRA adapter to answer Yes or No (ReiT; ReLLa, WWW 2024), in one process or in several torch.distributed
# ones; does not depend on Ray.
#
# Each step depends only on the seed and its number: its rows, their distribution over workers, and dropout. So a killed
# run resumes from its last checkpoint with exactly the same results. The rows of a step are computed in order of
# length, as many at a time as fit `micro_tokens`, with the vocabulary's logits at only the position that the loss sees:
# they would cost more than the layers of a small model. Workers sum their gradients once per step, which equals the
# result of one worker, however unevenly the rows are distributed.


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


class TuningProgress(Config):
    """Work done so far."""

    step: int = 0
    losses: tuple[float, ...] = ()  # per step
    valid_aucs: tuple[tuple[int, float], ...] = ()  # step, AUC
    best_auc: float = -1.0
    best_step: int = 0
    stale: int = 0  # evaluations since the best

    def after_step(self, loss: float) -> "TuningProgress":
        """One step later."""
        return self.model_copy(update={"step": self.step + 1, "losses": (*self.losses, loss)})

    def after_evaluation(self, auc: float) -> "TuningProgress":
        """With one more AUC on the valid split."""
        changes = {"valid_aucs": (*self.valid_aucs, (self.step, auc))}
        if auc > self.best_auc:
            return self.model_copy(update={**changes, "best_auc": auc, "best_step": self.step, "stale": 0})
        return self.model_copy(update={**changes, "stale": self.stale + 1})


@dataclass(frozen=True)
class Checkpoint:
    """All tensors by the names of the adapter's weights."""

    progress: TuningProgress
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]  # AdamW's exp_avg and exp_avg_sq
    best: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, progress: TuningProgress, weights: Mapping[str, Tensor], optimizer: Optimizer, best: Mapping[str, Tensor]
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
            progress = TuningProgress.model_validate_json(about["progress"])
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

    model: str  # its identity (generation.engines.model_identity)
    wording: str  # prompting.frameworks.rank_fingerprint
    rank: int
    progress: TuningProgress
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
    progress: TuningProgress,
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
    progress: TuningProgress


def tune(
    model: Any,
    train: Examples,
    valid: Examples,
    config: TuningSettings,
    worker: Worker = ALONE,
    *,
    resume: Checkpoint | None = None,
    on_step: Callable[[TuningProgress], None] | None = None,
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
    progress, best = TuningProgress(), {name: weight.detach().clone() for name, weight in weights.items()}
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
        model.set_attn_implementation(register_by_rows())
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


# ----------------------------------------------------------------------------------------------------------------- lora
# Tunes the ranker's adapter on Ray Train workers, and scores with it in an engine actor: the only file of this package
# that uses Ray.
#
# Checkpoints go to the workspace, not to Ray, so a run resumes after a lost worker (Ray restarts the
# group) and after a lost driver (run the same command again) alike.


_AT_ONCE = 256  # prompts per call of the actor: determines how often progress shows


class TuningSpec(WorkerSpec):
    """A tuning run; each worker reads its rows and the model itself."""

    folder: str  # of the run, in the workspace; contains train.parquet and valid.parquet (samples.TUNING_ROWS)
    model: str
    revision: str | None
    wording: str  # prompting.frameworks.rank_fingerprint
    settings: TuningSettings

    @property
    def adapter(self) -> str:
        """The adapter's folder."""
        return f"{self.folder}/adapter"

    @property
    def checkpoint(self) -> str:
        """Checkpoint of the run; removed once the adapter exists."""
        return f"{self.folder}/checkpoint.safetensors"


def tune_adapter(workspace: Workspace, spec: TuningSpec, on_steps: Callable[[int], None]) -> Adapter:
    """Adapter of a spec: tuned, resumed from its checkpoint, or already finished.

    Ray must be initialized. Worker output goes to the workspace's log file `tune_ranker`. on_steps: called with
    the number of newly finished steps, from a second thread of this process. Raises any OwlRecError
    of a worker.
    """
    if not workspace.exists(spec.adapter, "ranker.json"):
        with _announcing(workspace, spec, on_steps):
            fit_workers(workspace, _tune, spec, name=f"{spec.folder}/ray/tune")
        workspace.delete_file(spec.checkpoint)
        workspace.delete_file(_progress_file(spec))
    return open_adapter(workspace, spec.adapter, model=model_identity(spec.model, spec.revision), wording=spec.wording)


def score_questions(
    engine: VllmEngineConfig,
    questions: Sequence[tuple[str, str]],
    adapters: Mapping[str, Adapter | None],
    *,
    log_path: str,
    use_gpu: bool = False,
    on_scored: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Probabilities of Yes by adapter name: float64 [n], nan for failed prompts.

    None is the untuned model. One actor has the engine and ends with the call. Ray must be
    initialized. Raises EngineError if it cannot start or dies.
    """
    import ray

    ranks = [adapter.manifest.rank for adapter in adapters.values() if adapter is not None]
    # On a CPU an engine's speed scales with its share of the machine's cores.
    cpus = 1 if use_gpu else engine.threads or os.cpu_count() or 1
    actor = ray.remote(_Scoring).options(num_cpus=cpus, num_gpus=int(use_gpu)).remote(log_path)
    try:
        ray.get(actor.start.remote(engine, max(ranks, default=None)))
        scores = {}
        for name, adapter in adapters.items():
            parts = []
            for start in range(0, len(questions), _AT_ONCE):
                asked = list(questions[start : start + _AT_ONCE])
                parts.append(ray.get(actor.score.remote(asked, adapter.folder if adapter else None)))
                if on_scored:
                    on_scored(len(asked))
            scores[name] = np.concatenate([np.empty(0), *parts])
        return scores
    except ray.exceptions.RayError as error:
        mistake = root_mistake(error) or EngineError(f"the scoring engine has died ({error}). See {log_path}.")
        raise mistake from None
    finally:
        ray.kill(actor)


class _Scoring:
    """The actor. Engine errors are raised by `start`; raised here, Ray would wrap them in a traceback."""

    def __init__(self, log_path: str) -> None:
        redirect_output(log_path)

    def start(self, engine: VllmEngineConfig, lora_rank: int | None) -> None:
        from owlrec.ranking.scorer import LlmScorer

        self._scorer = LlmScorer(engine, lora_rank=lora_rank)

    async def score(self, questions: list[tuple[str, str]], adapter: str | None) -> np.ndarray:
        return (await self._scorer.score(questions, adapter)).probabilities


def _tune(loop_config: dict[str, Any]) -> None:
    """Main function of each worker."""
    workspace: Workspace = loop_config["workspace"]
    redirect_output(workspace.log_path("tune_ranker"))
    import pyarrow.compute as pc
    from safetensors.torch import save

    spec = TuningSpec.model_validate(loop_config["spec"])
    worker = this_worker(spec.threads)
    tokenizer = load_tokenizer(spec.model, spec.revision)
    train, valid = (workspace.read_parquet(f"{spec.folder}/{split}.parquet") for split in ("train", "valid"))
    valid = valid.filter(pc.is_in(valid["shown"], pc.unique(train["shown"])))  # stops on the tuned prompt types
    to_tune, to_stop = (tokenize(rows, tokenizer, max_tokens=spec.settings.max_tokens) for rows in (train, valid))
    model = load_model(resolve_model(spec.model), spec.revision, spec.settings)
    steps = Schedule(len(to_tune), spec.settings).steps
    # All ranks read the same checkpoint: none is written before every rank takes part in a step.
    start = Checkpoint.from_bytes(workspace.read_bytes(spec.checkpoint)) if workspace.exists(spec.checkpoint) else None

    def tell(progress: TuningProgress) -> None:
        about = {"step": progress.step, "steps": steps, "loss": progress.losses[-1], "pid": os.getpid()}
        workspace.write_json(_progress_file(spec), about)

    def keep(checkpoint: Checkpoint) -> None:
        workspace.write_bytes(spec.checkpoint, checkpoint.to_bytes())

    tuned = tune(
        model,
        to_tune,
        to_stop,
        spec.settings,
        worker,
        resume=start,
        on_step=tell,
        keep=keep,
    )
    if worker.rank == 0:
        save_adapter(
            workspace,
            spec.adapter,
            save(tuned.weights, {"format": "pt"}),
            tuned.settings | {"base_model_name_or_path": spec.model, "revision": spec.revision},
            model=model_identity(spec.model, spec.revision),
            wording=spec.wording,
            progress=tuned.progress,
        )


def _progress_file(spec: TuningSpec) -> str:
    return f"{spec.folder}/progress.json"


def _announcing(
    workspace: Workspace, spec: TuningSpec, on_steps: Callable[[int], None]
) -> AbstractContextManager[None]:
    """Calls `on_steps` while the block runs."""
    reported = 0

    def look() -> None:
        nonlocal reported
        done = workspace.read_json(_progress_file(spec))["step"] if workspace.exists(_progress_file(spec)) else 0
        if done > reported:  # after a restart, steps are repeated
            on_steps(done - reported)
            reported = done

    return looking_meanwhile(look)
