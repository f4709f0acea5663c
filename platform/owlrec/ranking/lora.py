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
from owlrec.ctr.training import WorkersJob, fit_workers, looking_meanwhile, this_worker
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
# torch's flash kernel for CPUs (2.13) reaches a tenth of what the same cores do in a bf16 matrix product where they
# have no AMX, and spends a third of a tuning step there. A prompt has a few hundred tokens: its scores fit a core's
# cache, so nothing is gained by never writing them down.


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

    Heads of a group are one product with the keys that they share. A mask beyond the causal one, as of a window that is
    shorter than the prompt, and whatever else is not plain, goes to torch's own kernel.
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
# Tunes a LoRA adapter to answer Yes or No (ReiT; ReLLa, WWW 2024), on one process or on several that torch.distributed
# joins; knows nothing of Ray.
#
# What a step does follows from the seed and its number alone: which rows it takes, how they are dealt to workers, what
# dropout drops. So a run that was killed goes on from its last checkpoint exactly as it would have gone on without.
# Rows of a step are computed in order of length, as many at a time as fit `micro_tokens`, and the vocabulary's logits
# at the one position that the loss sees: they would cost more than the layers of a small model. Workers add up their
# gradients once a step, which gives what one worker would have computed, however unevenly the rows fell.


# ------------------------------------------------------------------------------------------------------------- examples
# Tuning rows as token ids: prompts that end where the answer begins, and the one token that should follow.
#
# The loss sees that token alone. The end of the turn, which every answer shares, would be learnt in a few steps and
# then halve what Yes and No weigh.


@dataclass(frozen=True)
class Examples:
    """Rows to tune on, or to judge by."""

    prompts: list[np.ndarray]  # int32, each of its own length
    labels: np.ndarray  # bool [n]: whether the answer is Yes
    answers: Answers  # one token each

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]: tokens of each prompt."""
        return np.array([len(prompt) for prompt in self.prompts], dtype=np.int64)

    @property
    def targets(self) -> np.ndarray:
        """int64 [n]: the token that should follow each prompt."""
        return np.where(self.labels, self.answers.yes[0], self.answers.no[0])


def tokenise(rows: pa.Table, tokenizer: Any, *, max_tokens: int) -> Examples:
    """The rows (samples.TUNING_ROWS) in the model's chat template.

    Raises EngineError where Yes and No cannot be told by their first token, RecipeError where a prompt is longer than
    `max_tokens`.
    """
    answers = likely_answers(tokenizer, find_answers(tokenizer))
    prompts = []
    for row in rows.select(["user_id", "item_id", "system", "text"]).to_pylist():
        ids = render_chat(tokenizer, row["system"], row["text"], TEMPLATE_OPTIONS)
        if len(ids) > max_tokens:
            raise RecipeError(
                f"ranking.prompt: the prompt of user {row['user_id']} and item {row['item_id']} has "
                f"{len(ids)} tokens, but {max_tokens} are allowed. Lower ranking.prompt.history_tokens, which drops "
                "the oldest behaviours."
            )
        prompts.append(np.array(ids, dtype=np.int32))
    labels = np.array([answer == YES for answer in rows["answer"].to_pylist()], dtype=bool)
    return Examples(prompts, labels, answers)


# ---------------------------------------------------------------------------------------------------------- checkpoints
# Where a tuning run stands, as one safetensors file: adapter, optimiser, the best adapter so far, and the counts.
#
# One file, so that a reader never sees the adapter of one step with the optimiser of another. What else a run depends
# on follows from its seed and its step (see `tuning`).


_VERSION = "1"


class TuningProgress(Config):
    """What has been done so far."""

    step: int = 0
    losses: tuple[float, ...] = ()  # of each step
    valid_aucs: tuple[tuple[int, float], ...] = ()  # step, AUC
    best_auc: float = -1.0
    best_step: int = 0
    stale: int = 0  # evaluations since the best

    def after_step(self, loss: float) -> "TuningProgress":
        """One step later."""
        return self.model_copy(update={"step": self.step + 1, "losses": (*self.losses, loss)})

    def after_evaluation(self, auc: float) -> "TuningProgress":
        """With one more AUC of the valid split."""
        found = {"valid_aucs": (*self.valid_aucs, (self.step, auc))}
        if auc > self.best_auc:
            return self.model_copy(update={**found, "best_auc": auc, "best_step": self.step, "stale": 0})
        return self.model_copy(update={**found, "stale": self.stale + 1})


@dataclass(frozen=True)
class Checkpoint:
    """All tensors by the names of the adapter's weights."""

    progress: TuningProgress
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]  # AdamW's exp_avg and exp_avg_sq
    best: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, progress: TuningProgress, weights: Mapping[str, Tensor], optimiser: Optimizer, best: Mapping[str, Tensor]
    ) -> "Checkpoint":
        """Of a running optimiser."""
        moments = {
            kind: {name: optimiser.state[weight][kind] for name, weight in weights.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        return cls(progress, dict(weights), moments, dict(best))

    def restore(self, weights: Mapping[str, Tensor], optimiser: Optimizer) -> None:
        """Puts weights and moments where they were. Raises WorkspaceError where the adapter has another shape."""
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        if shapes != {name: tuple(weight.shape) for name, weight in self.weights.items()}:
            raise WorkspaceError(
                "the checkpoint is of another adapter (other modules, rank or model). Delete it to tune from the start."
            )
        for name, weight in weights.items():
            weight.data.copy_(self.weights[name])
            state: dict[str, Any] = optimiser.state[weight]
            state["step"] = weight.new_tensor(float(self.progress.step), device="cpu")
            for kind, tensors in self.moments.items():
                state[kind] = tensors[name].to(weight.device, weight.dtype).clone()

    def to_bytes(self) -> bytes:
        """The file."""
        groups = {"weights": self.weights, "best": self.best, **self.moments}
        tensors = {f"{group}/{n}": t.detach().cpu().contiguous() for group, of in groups.items() for n, t in of.items()}
        return save(tensors, {"version": _VERSION, "progress": self.progress.model_dump_json()})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Checkpoint":
        """What `to_bytes` wrote. Raises WorkspaceError where it is damaged or of another version."""
        try:
            about = metadata_of(data)
            if about["version"] != _VERSION:
                raise ValueError(f"it is of version {about['version']}")
            groups: dict[str, dict[str, Tensor]] = {g: {} for g in ("weights", "best", "exp_avg", "exp_avg_sq")}
            for path, tensor in load(data).items():
                group, _, name = path.partition("/")
                groups[group][name] = tensor
            progress = TuningProgress.model_validate_json(about["progress"])
        except (SafetensorError, ValidationError, KeyError, ValueError) as error:
            raise WorkspaceError(f"the checkpoint is damaged ({error}). Delete it to tune from the start.") from None
        moments = {kind: groups[kind] for kind in ("exp_avg", "exp_avg_sq")}
        return cls(progress, groups["weights"], moments, groups["best"])


# ------------------------------------------------------------------------------------------------------------- adapters
# A tuned adapter on disk: the folder that peft and vLLM load as it is, and beside their files what it was tuned for.
#
#     adapter_config.json, adapter_model.safetensors    as peft writes them
#     ranker.json                                       model, wording and settings; written last
#
# vLLM loads an adapter of whatever model into whatever model of the same shape, and a prompt in another wording scores
# without complaint; ranker.json is what both are checked against.


_FILES = ("adapter_config.json", "adapter_model.safetensors")


class RankerManifest(BaseModel):
    """What an adapter was tuned for, and how that went."""

    model: str  # its identity (generation.engines.model_identity)
    wording: str  # prompting.frameworks.rank_fingerprint
    rank: int
    progress: TuningProgress
    sha256: str  # of the weights


@dataclass(frozen=True)
class Adapter:
    """A checked adapter on a local disk."""

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
    """What `save_adapter` wrote, on a local disk: copied into OwlRec's cache from an object store.

    Raises WorkspaceError where it is missing or damaged, EngineError where it was tuned for another model or wording.
    """
    where = workspace.path(folder)
    about = workspace.read_json(f"{folder}/ranker.json")
    weights = workspace.read_bytes(f"{folder}/{_FILES[1]}")
    try:
        manifest = RankerManifest.model_validate(about)
        if manifest.sha256 != hashlib.sha256(weights).hexdigest():
            raise ValueError("its weights are not those that were written")
    except ValidationError as error:
        raise WorkspaceError(f"{where}/ranker.json is damaged ({error.errors()[0]['msg']}). Tune again.") from None
    except ValueError as error:
        raise WorkspaceError(f"{where} is damaged: {error}. Delete the folder and tune again.") from None
    if manifest.model != model:
        raise EngineError(
            f"{where} is an adapter of {manifest.model}, but the ranker's model is {model}. Name the model that it was "
            "tuned for, or tune one for this model."
        )
    if manifest.wording != wording:
        raise EngineError(
            f"{where} was tuned on prompts of another wording ({manifest.wording[:8]}, not {wording[:8]}). Use the "
            "ranking.prompt and the scenario that it was tuned with, or tune again."
        )
    if workspace.local:
        return Adapter(where, manifest)
    local = cache_folder("adapters", manifest.sha256[:16])
    for name in _FILES:
        if not (local / name).exists():
            Storage(local).write_bytes(name, workspace.read_bytes(f"{folder}/{name}"))
    return Adapter(str(local), manifest)


# --------------------------------------------------------------------------------------------------------------- tuning


# With beta2 = 0.999 the second moment of a run of a hundred steps still remembers the first.
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Tuned:
    """weights: of the best evaluation, by peft's names; settings: of the adapter, as peft writes them."""

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
    """Tunes to the best AUC on `valid`. Where world_size exceeds 1, every rank of the process group must call it.

    model: a causal LM of transformers, whose own weights stay as they are. resume: where an earlier call of the same
    arguments stood. on_step, keep: called by rank 0, after each step and with each checkpoint. Raises RecipeError where
    the loss is not a number, `valid` has one class only, or the model has no such modules.
    """
    refuse_unusable(train, valid)
    torch.manual_seed(config.seed)
    adapted = _adapt(model, config).to(worker.device)
    weights = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    optimiser = torch.optim.AdamW(weights.values(), config.learning_rate, betas=_BETAS, weight_decay=0.0)
    progress, best = TuningProgress(), {name: weight.detach().clone() for name, weight in weights.items()}
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


def load_model(folder: str, revision: str | None, config: TuningSettings) -> Any:
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
        model.set_attn_implementation(register_by_rows())
    return model


class Schedule:
    """Which rows each step takes, at what learning rate, and after which steps the model is judged."""

    def __init__(self, n_rows: int, config: TuningSettings) -> None:
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
            "stop. Prepare more users."
        )


def _step(
    model: Any,
    weights: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
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
            f"ranking.engine: LoRA finds no {' and '.join(config.target_modules)} in the model. Name another. ({error})"
        ) from None


def _export(adapted: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from peft import get_peft_model_state_dict

    weights = {name: w.detach().float().cpu().contiguous() for name, w in get_peft_model_state_dict(adapted).items()}
    settings = adapted.peft_config["default"].to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    return weights, plain | {"inference_mode": True, "base_model_name_or_path": None}


# ----------------------------------------------------------------------------------------------------------------- lora
# Tunes the ranker's adapter on Ray Train workers, and scores with it in an engine actor: the only file of this package
# that knows Ray.
#
# Checkpoints go to the workspace, not to Ray: a run then goes on where it stood after a lost worker (Ray restarts the
# group) and after a lost driver (the same command again) alike.


_AT_ONCE = 256  # questions of a call of the actor: how often progress shows


class TuningJob(WorkersJob):
    """Of a run of the ranker; each worker reads its rows and the model itself."""

    folder: str  # of the run, in the workspace: it holds train.parquet and valid.parquet (samples.TUNING_ROWS)
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
        """Where the run stands; gone once the adapter is there."""
        return f"{self.folder}/checkpoint.safetensors"


def tune_adapter(workspace: Workspace, job: TuningJob, on_steps: Callable[[int], None]) -> Adapter:
    """The adapter of a job: tuned, or tuned on from its checkpoint, or found finished.

    Ray must be initialised. Worker output goes to the workspace's log file `tune_ranker`. on_steps: called with
    how many more steps are done, from a second thread of this process. Raises what a worker raised, if it is an
    OwlRecError.
    """
    if not workspace.exists(job.adapter, "ranker.json"):
        with _announcing(workspace, job, on_steps):
            fit_workers(workspace, _tune, job, name=f"{job.folder}/ray/tune")
        workspace.delete_file(job.checkpoint)
        workspace.delete_file(_progress_file(job))
    return open_adapter(workspace, job.adapter, model=model_identity(job.model, job.revision), wording=job.wording)


def score_questions(
    engine: VllmEngineConfig,
    questions: Sequence[tuple[str, str]],
    adapters: Mapping[str, Adapter | None],
    *,
    log_path: str,
    use_gpu: bool = False,
    on_scored: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Of each adapter, by its name, the probabilities of Yes: float64 [n], nan where a question cannot be asked.

    None stands for the model as it is. One actor holds the one engine, which ends with the call. Ray must be
    initialised. Raises EngineError where it cannot start or dies.
    """
    import ray

    ranks = [adapter.manifest.rank for adapter in adapters.values() if adapter is not None]
    # On a CPU an engine with fewer cores than the machine has runs that much slower.
    cpus = 1 if use_gpu else engine.threads or os.cpu_count() or 1
    actor = ray.remote(_Scoring).options(num_cpus=cpus, num_gpus=int(use_gpu)).remote(log_path)
    try:
        ray.get(actor.start.remote(engine, max(ranks, default=None)))
        found = {}
        for name, adapter in adapters.items():
            parts = []
            for start in range(0, len(questions), _AT_ONCE):
                asked = list(questions[start : start + _AT_ONCE])
                parts.append(ray.get(actor.score.remote(asked, adapter.folder if adapter else None)))
                if on_scored:
                    on_scored(len(asked))
            found[name] = np.concatenate([np.empty(0), *parts])
        return found
    except ray.exceptions.RayError as error:
        mistake = root_mistake(error) or EngineError(f"the scoring engine has died ({error}). See {log_path}.")
        raise mistake from None
    finally:
        ray.kill(actor)


class _Scoring:
    """The actor. What is wrong with an engine is raised by `start`: raised here, Ray would keep a traceback of it."""

    def __init__(self, log_path: str) -> None:
        redirect_output(log_path)

    def start(self, engine: VllmEngineConfig, lora_rank: int | None) -> None:
        from owlrec.ranking.scorer import LlmScorer

        self._scorer = LlmScorer(engine, lora_rank=lora_rank)

    async def score(self, questions: list[tuple[str, str]], adapter: str | None) -> np.ndarray:
        return (await self._scorer.score(questions, adapter)).probabilities


def _tune(loop_config: dict[str, Any]) -> None:
    """What each worker runs."""
    workspace: Workspace = loop_config["workspace"]
    redirect_output(workspace.log_path("tune_ranker"))
    import pyarrow.compute as pc
    from safetensors.torch import save

    job = TuningJob.model_validate(loop_config["job"])
    worker = this_worker(job.threads)
    tokenizer = load_tokenizer(job.model, job.revision)
    train, valid = (workspace.read_parquet(f"{job.folder}/{split}.parquet") for split in ("train", "valid"))
    valid = valid.filter(pc.is_in(valid["shown"], pc.unique(train["shown"])))  # stopped by what is tuned on
    to_tune, to_stop = (tokenise(rows, tokenizer, max_tokens=job.settings.max_tokens) for rows in (train, valid))
    model = load_model(resolve_model(job.model), job.revision, job.settings)
    steps = Schedule(len(to_tune), job.settings).steps
    # All ranks read the same one: none is written before every rank takes part in a step.
    start = Checkpoint.from_bytes(workspace.read_bytes(job.checkpoint)) if workspace.exists(job.checkpoint) else None

    def tell(progress: TuningProgress) -> None:
        about = {"step": progress.step, "steps": steps, "loss": progress.losses[-1], "pid": os.getpid()}
        workspace.write_json(_progress_file(job), about)

    def keep(checkpoint: Checkpoint) -> None:
        workspace.write_bytes(job.checkpoint, checkpoint.to_bytes())

    tuned = tune(
        model,
        to_tune,
        to_stop,
        job.settings,
        worker,
        resume=start,
        on_step=tell,
        keep=keep,
    )
    if worker.rank == 0:
        save_adapter(
            workspace,
            job.adapter,
            save(tuned.weights, {"format": "pt"}),
            tuned.settings | {"base_model_name_or_path": job.model, "revision": job.revision},
            model=model_identity(job.model, job.revision),
            wording=job.wording,
            progress=tuned.progress,
        )


def _progress_file(job: TuningJob) -> str:
    return f"{job.folder}/progress.json"


def _announcing(workspace: Workspace, job: TuningJob, on_steps: Callable[[int], None]) -> AbstractContextManager[None]:
    """Calls `on_steps` while the block runs."""
    told = 0

    def look() -> None:
        nonlocal told
        done = workspace.read_json(_progress_file(job))["step"] if workspace.exists(_progress_file(job)) else 0
        if done > told:  # after a restart steps are done again
            on_steps(done - told)
            told = done

    return looking_meanwhile(look)
