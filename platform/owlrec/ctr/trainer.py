"""Training of one trial in one process: optimizer, checkpoints, epochs, weights of the best epoch.

`training` runs it in the processes of Ray Train; tests and notebooks need only `train_one`.
"""

import ctypes
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F

from owlrec import evaluation as metrics
from owlrec.ctr.batches import SplitBatches, Tables, epoch_steps, scan_steps, segments
from owlrec.ctr.experiment import (
    SCORES_FILE,
    SHARD_ABOVE_ROWS,
    SPARSE_ABOVE_ROWS,
    TABLE_LEARNING_RATE,
    CTRConfig,
    Metrics,
    ScoredRows,
    Trial,
    TrialResult,
    grid_folder,
    slice_metrics,
    slices_of,
)
from owlrec.ctr.features import RESERVED, Features, FeatureSchema, Grades, ItemFeatures, Split, Vocabularies
from owlrec.ctr.knowledge_tables import (
    OLDER_PARTITIONS,
    STREAMING,
    Deciles,
    Strata,
    VectorTable,
    arm_parts,
    arm_sources,
    cascade_slots,
    refuse_two_encoders,
    refuse_two_sizes,
    source_slots,
)
from owlrec.ctr.model import CTRModel, ModelSpec, ShardedTable, code_sizes, plain_table
from owlrec.errors import RecipeError, WorkspaceError
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

# --------------------------------------------------------------------------------------------------------------- worker
# One of the processes in a torch.distributed group; CTR models and the LLM ranker train in such groups.


@dataclass(frozen=True)
class Worker:
    """Rank and number of this worker, and its device."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


ALONE = Worker()


# --------------------------------------------------------------------------------------------------------------- memory
# Tells glibc's allocator to keep memory that a training step frees.


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_ constants of malloc.h


def keep_freed_memory() -> None:
    """From now on this process returns freed memory only when it exits.

    By default glibc maps each tensor of more than 32 MB on allocation and unmaps it when freed. On a CPU a quarter of a
    step then goes into page faults (batch 4,096: DCN-V2 83 ms to 64, DIN 103 ms to 74). For processes that train and
    exit. Does nothing without glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(option, 1 << 30)


# ------------------------------------------------------------------------------------------------------------ optimizer
# Optimizers of a CTR model: AdamW for dense weights, row-wise Adagrad for large id tables.
#
# Row-wise Adagrad (FBGEMM's EXACT_ROWWISE_ADAGRAD, used by DLRM) keeps one number per row, the sum of its
# gradients' mean squares, and touches only the rows of a batch. So a step's time does not grow with the
# table, whereas a dense gradient of 10^7 x 32 is 1.3 GB, and AdamW's two moments twice that again. Small tables stay
# on AdamW, because almost every row is in every batch: see SPARSE_ABOVE_ROWS.


_EPSILON = 1e-8  # FBGEMM's default


class RowwiseAdagrad(torch.optim.Optimizer):
    """For tables [n, e] with sparse gradients: w_i -= lr * g_i / (sqrt(s_i) + eps), s_i the sum of mean(g_i^2)."""

    def __init__(self, tables: list[Tensor], lr: float) -> None:
        super().__init__(tables, {"lr": lr})
        for table in tables:
            self.state[table]["sum"] = torch.zeros(len(table), device=table.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the rows with a gradient. Every gradient must be sparse; its rows may repeat."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                gradient = table.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                sums = self.state[table]["sum"]
                seen = sums.index_select(0, rows) + values.square().mean(1)
                sums[rows] = seen
                scale = -group["lr"] / (seen.sqrt() + _EPSILON)
                table[rows] = torch.addcmul(table.index_select(0, rows), values, scale.unsqueeze(1))


def large_tables(model: nn.Module, above_rows: int) -> dict[str, Tensor]:
    """Name -> weights of each embedding table with more than `above_rows` rows; from now on these have sparse
    gradients.
    """
    tables: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.num_embeddings > above_rows:
            module.sparse = True
            tables[f"{name}.weight"] = module.weight
    return tables


def mean_over_ranks(gradient: Tensor, world_size: int) -> Tensor:
    """A table's gradient averaged over the ranks; each sends only the rows it touched.

    DistributedDataParallel could do this with gloo but not with NCCL, so it skips these tables.
    gradient: sparse [n, e]; ranks may have touched different numbers of rows. Returns the same on all ranks, coalesced.
    """
    gradient = gradient.coalesce()
    rows, values = gradient.indices()[0], gradient.values()
    sizes = [rows.new_empty(1) for _ in range(world_size)]
    dist.all_gather(sizes, rows.new_tensor([len(rows)]))
    lengths = [int(size) for size in sizes]
    missing = max(lengths) - len(rows)
    all_rows = [rows.new_empty(max(lengths)) for _ in lengths]
    all_values = [values.new_empty(max(lengths), values.shape[1]) for _ in lengths]
    dist.all_gather(all_rows, F.pad(rows, (0, missing)))
    dist.all_gather(all_values, F.pad(values, (0, 0, 0, missing)))
    rows = torch.cat([part[:n] for part, n in zip(all_rows, lengths, strict=True)])
    values = torch.cat([part[:n] for part, n in zip(all_values, lengths, strict=True)])
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values / world_size, gradient.shape, check_invariants=False
    ).coalesce()


class Optimizers:
    """Both optimizers of a model. Learning rates stay constant: early stopping ends a trial after a few epochs."""

    def __init__(
        self,
        model: nn.Module,
        config: CTRConfig,
        world_size: int = 1,
        sparse_above_rows: int = SPARSE_ABOVE_ROWS,
        table_learning_rate: float = TABLE_LEARNING_RATE,
    ) -> None:
        self.config, self.world_size = config, world_size
        self.steps = 0  # completed
        self.tables = large_tables(model, sparse_above_rows)
        dense = [weight for name, weight in model.named_parameters() if name not in self.tables]
        self._optimizers: list[torch.optim.Optimizer] = [
            # One kernel for all weights; foreach, the default, makes a dozen passes over them.
            # No weight decay: from 0 to 1 it moved the valid AUC by less than .0005, early stopping does its work.
            torch.optim.AdamW(dense, lr=config.learning_rate, weight_decay=0.0, fused=True)
        ]
        if self.tables:
            self._optimizers.append(RowwiseAdagrad(list(self.tables.values()), table_learning_rate))

    def zero_grad(self) -> None:
        """Clears all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """One step of both. Dense gradients must already be averaged over the ranks; tables' gradients are averaged
        here."""
        if self.world_size > 1:
            for table in self.tables.values():
                if table.grad is not None:
                    table.grad = mean_over_ranks(table.grad, self.world_size)
        for optimizer in self._optimizers:
            optimizer.step()
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """State for a checkpoint, in addition to `steps`."""
        return {
            f"{i}.{weight}.{name}": value
            for i, optimizer in enumerate(self._optimizers)
            for weight, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Restores `state` and `steps` of the same model and settings."""
        self.steps = steps
        for i, optimizer in enumerate(self._optimizers):
            restored: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                number, weight, name = key.split(".")
                if int(number) == i:
                    restored.setdefault(int(weight), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})


# ----------------------------------------------------------------------------------------------------------- checkpoint
# Checkpoint of a trial, so that a killed one resumes at the very next sample.
#
# One safetensors file has everything that the next step depends on: weights, the best epoch's weights, both
# optimizers, each rank's random state, and the position in the epoch's order of rows, which itself follows from seed
# and epoch. The file is replaced atomically, so no kill leaves half a checkpoint; and it is not a pickle.


class Progress(BaseModel):
    """Progress of a trial."""

    epoch: int = 1  # the current one
    batches: int = 0  # trained batches of it
    steps: int = 0  # over all epochs
    best_auc: float = -1.0
    best_epoch: int = 0
    training_s: float = 0.0  # without evaluation and without time lost to kills
    resumed: int = 0  # number of resumes


@dataclass(frozen=True)
class CheckpointFile:
    """A trial's checkpoint in the workspace, written every `every_steps` steps."""

    workspace: Workspace
    path: str
    every_steps: int
    trial: str = ""  # fingerprint of everything the tensors depend on; set by `of`

    def of(self, *parts: Any) -> "CheckpointFile":
        """The same file for a trial described by `parts` (models or plain values)."""
        return replace(self, trial=fingerprint(*parts))

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the file."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"trial": self.trial, "progress": progress.model_dump_json()}
        self.workspace.write_bytes(self.path, safetensors.torch.save(plain, metadata))

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """Loads the file of `save` on the CPU; None if there is none. Raises WorkspaceError if it is damaged or belongs
        to another trial.
        """
        if not self.workspace.exists(self.path):
            return None
        data = self.workspace.read_bytes(self.path)
        try:
            tensors = safetensors.torch.load(data)
            metadata = metadata_of(data)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise WorkspaceError(
                f"{self.workspace.path(self.path)} is not a readable checkpoint ({error}). Delete it to "
                "restart the trial."
            ) from None
        if metadata["trial"] != self.trial:
            raise WorkspaceError(
                f"{self.workspace.path(self.path)} is a checkpoint of another model or of other data. Delete "
                "it to restart the trial."
            )
        progress = Progress.model_validate_json(metadata["progress"])
        progress.resumed += 1
        return progress, tensors

    def of_rank(self, rank: int) -> "CheckpointFile":
        """The file of a worker's part of sharded tables."""
        return replace(self, path=f"{self.path}.{rank}")

    def delete(self, world_size: int = 1) -> None:
        """Removes the file, and those of the ranks, if they exist."""
        for path in (self.path, *(self.of_rank(rank).path for rank in range(world_size))):
            if self.workspace.exists(path):
                self.workspace.delete_file(path)


def metadata_of(data: bytes) -> dict[str, str]:
    """Metadata of a safetensors file, which safetensors itself reads only from files.

    Raises KeyError or ValueError if there is none.
    """
    length = int.from_bytes(data[:8], "little")  # length of the JSON header
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def random_states(worker: Worker) -> dict[str, Tensor]:
    """Name -> state of every rank's random generators. All ranks must call it."""
    states = {"cpu": torch.get_rng_state()}
    if torch.device(worker.device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(worker.device)
    if worker.world_size == 1:
        return {f"{name}.{worker.rank}": state for name, state in states.items()}
    all_states = {}
    for name, state in states.items():
        gathered = [torch.empty_like(state, device=worker.device) for _ in range(worker.world_size)]
        dist.all_gather(gathered, state.to(worker.device))
        all_states.update({f"{name}.{other}": part.cpu() for other, part in enumerate(gathered)})
    return all_states


def restore_random_states(states: Mapping[str, Tensor], worker: Worker) -> None:
    """Restores this rank's generators from `random_states`."""
    torch.set_rng_state(states[f"cpu.{worker.rank}"])
    if f"cuda.{worker.rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{worker.rank}"], worker.device)


# --------------------------------------------------------------------------------------------------------------- epochs
# The epochs of a trial: steps, early stopping on valid, checkpoints, and resuming from one.
#
# Everything a step depends on is either a function of seed and position (order of rows, learning rate) or in
# the checkpoint, so a killed trial ends with exactly the same weights as an uninterrupted one.


logger = logging.getLogger(__name__)

# With fewer steps per epoch, early stopping evaluates a model that has hardly moved: on 9,554 rows of MovieLens-100K,
# batches of 2048 stopped at epoch 1 in two of eight trials and were still improving after 15 in most others.
_MIN_STEPS = 30


class Epochs:
    """Trains a model, on this rank's share of each batch."""

    def __init__(
        self,
        model: CTRModel,
        config: CTRConfig,
        seed: int,
        sizes: Sequence[int],
        worker: Worker,
        checkpoint: CheckpointFile | None,
    ) -> None:
        """sizes: rows of each training shard."""
        self.model, self.config, self.seed, self.sizes = model, config, seed, sizes
        self.worker, self.checkpoint = worker, checkpoint
        n_rows = sum(sizes)
        self.batch_size = min(config.batch_size, max(1, n_rows // _MIN_STEPS))
        self.optimizers = Optimizers(model, config, worker.world_size, SPARSE_ABOVE_ROWS, TABLE_LEARNING_RATE)
        self.wrapped: nn.Module = model
        if worker.world_size > 1:
            # Buffers are the items' codes, the same everywhere; by default DDP broadcasts them at each step.
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                model, list(self.optimizers.tables)
            )
            self.wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        torch.manual_seed(seed + worker.rank)  # from here on, only dropout is random; it must differ between ranks
        self.progress = Progress()
        self.best_weights: dict[str, Tensor] = {}
        self.best_rows: dict[str, Tensor] = {}  # of this worker's part of sharded tables
        self._resume()

    def train(self, split: SplitBatches, valid_auc: Callable[[int], float]) -> Progress:
        """Trains to the end and loads the weights of the best epoch.

        valid_auc: called after each epoch with its number; all ranks must return the same. Its exceptions stop
        training.
        """
        progress = self.progress
        while True:
            self._train_epoch(split)
            auc = valid_auc(progress.epoch)
            if auc > progress.best_auc:
                progress.best_auc, progress.best_epoch = auc, progress.epoch
            if progress.epoch - progress.best_epoch >= self.config.patience or progress.epoch >= self.config.epochs:
                break
            if progress.best_epoch == progress.epoch:  # the last epoch's weights need no copy
                self.best_weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
                tables = self.model.sharded_tables
                self.best_rows = {name: table.local["rows"].clone() for name, table in tables.items()}
            progress.epoch, progress.batches = progress.epoch + 1, 0
        if progress.best_epoch != progress.epoch:
            self.model.load_state_dict(self.best_weights)
            for name, table in self.model.sharded_tables.items():
                table.local["rows"].copy_(self.best_rows[name])
        return progress

    def _train_epoch(self, split: SplitBatches) -> None:
        progress, model, me = self.progress, self.wrapped, self.worker
        order = epoch_steps(self.sizes, self.batch_size, self.seed, progress.epoch, me.rank, me.world_size)
        autocast = torch.autocast(
            torch.device(me.device).type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
        )
        model.train()
        started = time.perf_counter()
        with closing(split.batches(islice(order, progress.batches, None))) as batches:
            for batch, targets in batches:
                with autocast:
                    logits = model(batch)
                loss = targets.loss(logits.float())
                self.optimizers.zero_grad()
                loss.backward()
                self.optimizers.step()
                progress.batches, progress.steps = progress.batches + 1, progress.steps + 1
                if self.checkpoint is not None and progress.steps % self.checkpoint.every_steps == 0:
                    now = time.perf_counter()
                    progress.training_s += now - started
                    started = now
                    self._save(self.checkpoint)
        progress.training_s += time.perf_counter() - started

    def _save(self, checkpoint: CheckpointFile) -> None:
        random = random_states(self.worker)
        if tables := self.model.sharded_tables:
            own = {f"{part}/{name}": value for name, table in tables.items() for part, value in table.local.items()}
            own |= {f"best/{name}": value for name, value in self.best_rows.items()}
            checkpoint.of_rank(self.worker.rank).save(self.progress, own)
            dist.barrier()  # all parts are there before the file that names their step
        if self.worker.rank == 0:
            parts = {
                "model": self.model.state_dict(),
                "best": self.best_weights,
                "optimizer": self.optimizers.state(),
                "random": random,
            }
            checkpoint.save(self.progress, {f"{part}/{k}": v for part, held in parts.items() for k, v in held.items()})

    def _resume(self) -> None:
        saved = self.checkpoint.load() if self.checkpoint is not None else None
        if saved is None or not self._resume_tables(saved[0].steps):
            return
        self.progress, tensors = saved
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}, "random": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        self.model.load_state_dict(parts["model"])
        self.best_weights = parts["best"]
        self.optimizers.restore(parts["optimizer"], self.progress.steps)
        restore_random_states(parts["random"], self.worker)
        logger.info("resumed in epoch %d, after %d batches", self.progress.epoch, self.progress.batches)

    def _resume_tables(self, steps: int) -> bool:
        """Restores this worker's part of sharded tables. False, on every rank, if a part is of another step: a kill
        between two files, after which the trial starts again.
        """
        tables = self.model.sharded_tables
        if not tables:
            return True
        assert self.checkpoint is not None
        own = self.checkpoint.of_rank(self.worker.rank).load()
        same = torch.tensor([own is not None and own[0].steps == steps], dtype=torch.int32, device=self.worker.device)
        dist.all_reduce(same, dist.ReduceOp.MIN)
        if not bool(same) or own is None:
            return False
        for name, table in tables.items():
            for part, value in table.local.items():
                value.copy_(own[1][f"{part}/{name}"])
        self.best_rows = {key.removeprefix("best/"): v for key, v in own[1].items() if key.startswith("best/")}
        return True


# -------------------------------------------------------------------------------------------------------------- fitting
# Trains one trial, in one process or in several torch.distributed ones; does not depend on Ray.
#
# The best epoch is chosen on valid AUC; the test split is scored once, with that epoch's weights (KAR's released
# code selects on test, which inflates every figure). Vectors are gathered by id from memory-mapped shards, batch by
# batch.


_SCORING_ROWS = 8192
# Settings that may change while a trial is interrupted.
_CHANGEABLE_SETTINGS = {"backbones", "arms", "seeds", "patience"}


@dataclass(frozen=True)
class TrainingData:
    """Data shared by all trials of a grid."""

    features: Features
    knowledge: Mapping[str, Mapping[str, VectorTable]]  # source -> kind ("user", "item"), as needed by the arms

    def tables(self, trial: Trial) -> Tables | None:
        """Output of `tables_of`; a control exchanges vectors within deciles of the items' popularity in training and
        of the users' activity.
        """
        return tables_of(trial, self.knowledge, self.features.items.ids, self.strata)

    def covered(self, split: str) -> dict[str, np.ndarray]:
        """Slices of a split by the LLM's texts about the row's user and item, alike for all arms: name -> bool [n]."""
        given = self.knowledge.get(_COVERED, {})
        users, items = ((given[kind],) if kind in given else () for kind in ("user", "item"))
        tables, slices = Tables(users, items), dict[str, np.ndarray]()
        for side, rows in coverage(tables, self.features.splits[split]).items():
            slices |= {f"{side} has a text": rows, f"{side} has no text": ~rows}
        return {name: rows for name, rows in slices.items() if rows.any()}

    @cached_property
    def strata(self) -> tuple[Strata | None, Strata]:
        """Deciles of users, by their number of samples (None above _STRATA_ROWS of these), and of items."""
        items = Deciles(self.features.items.ids, self.features.item_counts[RESERVED:])
        splits = self.features.splits.values()
        if sum(map(len, splits)) > _STRATA_ROWS:
            return None, items
        users = np.concatenate([_columns(split, "user_ids")[0] for split in splits])
        return Deciles(*np.unique(users, return_counts=True)), items


_STRATA_ROWS = 1 << 26  # 0.5 GB of ids
_COVERED = "knowledge"  # whose coverage slices the test rows of all arms alike


def tables_of(
    trial: Trial,
    knowledge: Mapping[str, Mapping[str, VectorTable]],
    item_ids: np.ndarray,
    strata: tuple[Strata | None, Strata | None] = (None, None),
) -> Tables | None:
    """Vectors that a trial reads, None for arm "none".

    knowledge: as in TrainingData; item_ids: ItemFeatures.ids; strata: of users and items, for a control. Raises
    RecipeError if vectors are missing or come from several encoders, and SchemaError if two tables differ in size or
    codes are missing.
    """
    if trial.arm == "none":
        return None
    sources, parts = arm_sources(trial.arm, knowledge, trial.own), arm_parts(trial.arm)
    users: list[VectorTable] = []
    every: dict[str, VectorTable] = {}
    for number, source in enumerate(sources.user):
        if source in OLDER_PARTITIONS:
            continue
        table = every[f"{source} vectors of users"] = knowledge[source]["user"]
        if sources.user[number + 1 : number + 2] == OLDER_PARTITIONS[:1]:
            older = every[f"{STREAMING} vectors of users"] = knowledge[STREAMING]["user"]
            users += cascade_slots(table, older)
        else:
            users.append(table)
    items = {f"{source} vectors of items": knowledge[source]["item"] for source in sources.item}
    every |= items
    refuse_two_encoders(trial.arm, every)
    if parts.form != "codes":
        refuse_two_sizes(every)
    tables = Tables(tuple(users), tuple(items.values()), parts.form, source_slots(sources.user), item_ids)
    return tables.shuffled(trial.seed, *strata) if parts.shuffled else tables


@dataclass(frozen=True)
class Trained:
    """A trial's result, its model with the best epoch's weights, and its scores of the test split."""

    result: TrialResult
    model: CTRModel
    test: ScoredRows


def train_one(
    trial: Trial,
    data: TrainingData,
    config: CTRConfig,
    worker: Worker = ALONE,
    checkpoint: CheckpointFile | None = None,
    begin: Callable[[CTRModel, Vocabularies], None] | None = None,
) -> Trained:
    """Trains a trial to its best valid AUC, then scores valid and test with that epoch's weights.

    If world_size exceeds 1, every rank of the process group must call it; all return the same metrics and weights.
    checkpoint: resumes from it if it exists, and writes it. Callers delete it after storing the result.
    begin: loads other than random weights into the new model (WarmStart.load_into).
    Raises RecipeError if training diverges or the arm's vectors are missing, and WorkspaceError for a checkpoint
    of another model.
    """
    started = time.perf_counter()
    tables = data.tables(trial)
    splits = {name: SplitBatches(split, tables, worker.device) for name, split in data.features.splits.items()}
    torch.manual_seed(trial.seed)
    spec = ModelSpec.of(
        data.features.spec,
        trial.backbone,
        tables.dim if tables else 0,
        config,
        **(tables.slots if tables else {}),
        user_codes=code_sizes(tables.users) if tables and tables.form != "vectors" else (),
        item_codes=code_sizes(tables.items) if tables and tables.form != "vectors" else (),
    )
    _refuse_uncovered(trial, tables, splits["train"].split)
    model = CTRModel(spec, data.features.items, table_maker(worker))
    if begin is not None:
        begin(model, data.features.vocabularies)
    model = model.to(worker.device)
    train, labels = splits["train"].split, _columns(splits["valid"].split, "labels")[0]
    if checkpoint is not None:
        settings = (config.model_dump(exclude=_CHANGEABLE_SETTINGS), SPARSE_ABOVE_ROWS, TABLE_LEARNING_RATE)
        checkpoint = checkpoint.of(spec, trial, settings, worker.world_size, train.sizes)

    def valid_auc(epoch: int) -> float:
        scores = score(model, splits["valid"], worker)
        if not np.isfinite(scores).all():
            raise RecipeError(
                f"ctr: {trial.path} diverged in epoch {epoch} (a score is not finite). "
                f"Lower ctr.learning_rate (now {config.learning_rate})."
            )
        return metrics.auc(labels, scores)

    progress = Epochs(model, config, trial.seed, train.sizes, worker, checkpoint).train(splits["train"], valid_auc)
    (valid, valid_tasks), (test, test_tasks) = (_scored(model, splits[name], worker) for name in ("valid", "test"))
    items, lengths = _columns(splits["test"].split, "items", "history_lengths")
    slices = slices_of(items, lengths, data.features.item_counts) | data.covered("test")
    covered = {} if tables is None else coverage(tables, splits["test"].split)
    result = TrialResult(
        **trial.model_dump(),
        valid=_evaluate(valid),
        test=_evaluate(test),
        epochs=progress.epoch,
        best_epoch=progress.best_epoch,
        seconds=round(time.perf_counter() - started, 3),
        samples_per_s=round(progress.epoch * len(train) / max(progress.training_s, 1e-9), 1),
        parameters=sum(p.numel() for p in model.parameters())
        + sum(rows * dim for rows, dim in (table.shape for table in model.sharded_tables.values())),
        resumed=progress.resumed,
        slices=slice_metrics(test.labels, test.scores, slices),
        tasks={name: {"valid": valid_tasks[name], "test": test_tasks[name]} for name in valid_tasks},
        coverage={side: round(float(rows.mean()), 4) for side, rows in covered.items()},
    )
    return Trained(result, model.eval(), test)


def table_maker(worker: Worker) -> Callable[[int, int], nn.Module]:
    """Makes embedding tables: shared out among several workers if they are large and TorchRec is installed."""
    shares = worker.world_size > 1 and find_spec("torchrec") is not None

    def made(rows: int, dim: int) -> nn.Module:
        if shares and rows > SHARD_ABOVE_ROWS:
            return ShardedTable(rows, dim, TABLE_LEARNING_RATE, worker.device)
        return plain_table(rows, dim)

    return made


def all_weights(model: CTRModel, worker: Worker = ALONE) -> dict[str, Tensor]:
    """All weights by name, on the CPU; without sharded tables except on rank 0. All ranks must call it."""
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    for name, table in model.sharded_tables.items():
        whole = table.gathered(worker.rank)
        if whole is not None:
            weights[f"{name}.weight"] = whole
    return weights


_LEAST_COVERAGE = 0.01
_COVERAGE_ROWS = 1 << 16


def coverage(tables: Tables, split: Split, rows: int | None = None) -> dict[str, np.ndarray]:
    """Side ("user", "item") -> bool [n]: rows of a split with a vector from any source.

    rows: only so many first ones.
    """
    end = len(split) if rows is None else min(rows, len(split))
    names, covered = {"user": "user_ids", "item": "item_ids"}, {}
    ids = dict(zip(names, _columns(split, *names.values(), end=end), strict=True))
    times = _times(split, end)
    for side, side_tables in (("user", tables.users), ("item", tables.items)):
        if side_tables:
            found = [table.find(ids[side], times) >= 0 for table in side_tables]
            covered[side] = np.logical_or.reduce(found)
    return covered


def _times(split: Split, end: int) -> np.ndarray | None:
    timed = all(split.shards[shard].times is not None for shard, _, _ in segments(split.sizes, 0, end))
    return _columns(split, "times", end=end)[0] if timed else None


def _refuse_uncovered(trial: Trial, tables: Tables | None, train: Split) -> None:
    """Raises RecipeError if almost no training row has a vector of the arm: it would be `none` under another name.

    With vectors of one side alone the other side's default is learned; TrialResult.coverage counts that.
    """
    if tables is None:
        return
    shares = {side: float(rows.mean()) for side, rows in coverage(tables, train, _COVERAGE_ROWS).items()}
    if max(shares.values()) < _LEAST_COVERAGE:
        sides = " and ".join(f"of {side}s for {share:.2%}" for side, share in shares.items())
        raise RecipeError(
            f"ctr.arms: arm '{trial.arm}' has vectors {sides} of the training rows, less than {_LEAST_COVERAGE:.0%}. "
            "Generate texts that are earlier than the samples (split.cuts) and for their users and items, or remove "
            "the arm."
        )


def score(model: CTRModel, split: SplitBatches, worker: Worker = ALONE) -> np.ndarray:
    """float64 [n]: `score_labels` of the primary label."""
    return score_labels(model, split, worker)[:, 0]


def score_labels(model: CTRModel, split: SplitBatches, worker: Worker = ALONE) -> np.ndarray:
    """float64 [n, labels]: probabilities of a split's rows, in order, on every rank; each rank computes a range of
    them.
    """
    sizes, n = split.split.sizes, len(split.split)
    share = -(-n // worker.world_size)
    start, end = (min(n, share * rank) for rank in (worker.rank, worker.rank + 1))
    model.eval()
    with torch.no_grad(), closing(split.batches(scan_steps(sizes, start, end, _SCORING_ROWS))) as batches:
        parts = [_each_label(model(batch)) for batch, _ in batches]
    if model.sharded_tables:  # whose rows every worker asks for equally often
        missing = -(-share // _SCORING_ROWS) - len(parts)
        with torch.no_grad(), closing(split.batches(list(scan_steps(sizes, 0, 1, 1)) * missing)) as batches:
            for batch, _ in batches:
                model(batch)
    n_labels = 1 + len(model.spec.features.fields.tasks)
    logits = torch.cat([*parts, torch.empty(0, n_labels, device=split.device)])
    if worker.world_size > 1:
        # The last ranks may have fewer rows: they pad, and the truncation to n removes exactly that padding.
        logits = F.pad(logits, (0, 0, 0, share - len(logits)))
        gathered = [torch.empty_like(logits) for _ in range(worker.world_size)]
        dist.all_gather(gathered, logits)
        logits = torch.cat(gathered)[:n]
    return logits.double().sigmoid().cpu().numpy()


def _each_label(logits: Tensor) -> Tensor:
    """float32 [b, labels]."""
    return logits if logits.dim() == 2 else logits[:, None]


def _columns(split: Split, *names: str, end: int | None = None) -> list[np.ndarray]:
    """Columns of a split, copied, without the behaviors it refers to. end: only its first rows."""
    columns: list[list[np.ndarray]] = [[] for _ in names]
    for shard, a, b in segments(split.sizes, 0, len(split) if end is None else end):
        samples = split.shards[shard]
        for column, name in zip(columns, names, strict=True):
            column.append(np.array(getattr(samples, name)[a:b]))
    return [np.concatenate(column) for column in columns]


def _scored(model: CTRModel, split: SplitBatches, worker: Worker) -> tuple[ScoredRows, dict[str, float]]:
    """Scores of the primary label, and the AUC of each further one, on the rows where it is known."""
    user_ids, item_ids, labels = _columns(split.split, "user_ids", "item_ids", "labels")
    scores, tasks = score_labels(model, split, worker), model.spec.features.fields.tasks
    aucs = {}
    if tasks:
        (others,) = _columns(split.split, "others")
        for at, name in enumerate(tasks):
            known = ~np.isnan(others[:, at])
            aucs[name] = metrics.auc(others[known, at], scores[known, 1 + at])
    return ScoredRows(user_ids, item_ids, labels, scores[:, 0].copy()), aucs


def _evaluate(rows: ScoredRows) -> Metrics:
    gauc = metrics.gauc(rows.labels, rows.scores, rows.user_ids)
    return Metrics(
        auc=metrics.auc(rows.labels, rows.scores),
        gauc=None if np.isnan(gauc) else gauc,
        log_loss=metrics.log_loss(rows.labels, rows.scores),
        calibration_error=metrics.calibration_error(rows.labels, rows.scores),
    )


# --------------------------------------------------------------------------------------------------------------- export
# A trained trial on disk: model.safetensors, spec.json, test_scores.parquet and, written last, result.json.
#
# Vocabularies and items, which encode the input, are files in the grid's folder; an artifact has its own. No pickle:
# weights from other sources must not be able to run code.


VOCABULARIES = "vocabularies.parquet"
ITEMS = "items.safetensors"
VALUES = "values/"  # prefix of a field of the file: the vocabulary of a table of embeddings


def export_trial(
    workspace: Workspace, fingerprint: str, trained: Trained, weights: dict[str, Tensor] | None = None
) -> str:
    """Writes a trained trial and returns its folder, relative to the workspace; result.json completes it.

    weights: of `all_weights`, if the model has sharded tables.
    """
    folder = f"{grid_folder(fingerprint)}/{trained.result.trial.path}"
    weights = all_weights(trained.model) if weights is None else weights
    workspace.write_bytes(f"{folder}/model.safetensors", safetensors.torch.save(weights))
    workspace.write_json(f"{folder}/spec.json", trained.model.spec.model_dump(mode="json"))
    workspace.write_parquet(f"{folder}/{SCORES_FILE}", trained.test.to_table())
    workspace.write_json(f"{folder}/result.json", trained.result.model_dump(mode="json"))
    return folder


def load_trial(workspace: Workspace, folder: str, items: ItemFeatures) -> CTRModel:
    """A trained model, ready to score (in eval mode, on the CPU).

    items: the item table encoded by the grid's own vocabularies (`read_vocabularies`, `encode_items`).
    Raises WorkspaceError if the folder is incomplete or has weights of another model.
    """
    model = CTRModel(ModelSpec.model_validate(workspace.read_json(f"{folder}/spec.json")), items)
    try:
        model.load_state_dict(safetensors.torch.load(workspace.read_bytes(f"{folder}/model.safetensors")))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise WorkspaceError(
            f"{workspace.path(folder)}: weights and spec.json do not match ({error}). Delete the folder and "
            "run `train_ctr` again."
        ) from None
    return model.eval()


def write_vocabularies(workspace: Workspace, folder: str, vocabularies: Vocabularies) -> None:
    """Writes vocabularies.parquet: columns field and value, in the order of the codes."""
    fields = {
        "item": vocabularies.items.cast(pa.string()),
        **{f"{VALUES}{name}": values for name, values in vocabularies.values.items()},
        "grades": pa.array([repr(rating) for rating in vocabularies.grades]),  # lowest and highest
        "fields": pa.array([vocabularies.fields.model_dump_json()]),
    }
    # A field without values would vanish from the table, and a column of the model's input with it.
    values = [pa.concat_arrays([pa.array([None], pa.string()), v.cast(pa.string())]) for v in fields.values()]
    names = [pa.array([name] * len(v), pa.string()) for name, v in zip(fields, values, strict=True)]
    table = pa.table({"field": pa.concat_arrays(names), "value": pa.concat_arrays(values)})
    workspace.write_parquet(f"{folder}/{VOCABULARIES}", table)


def read_vocabularies(workspace: Workspace, folder: str) -> Vocabularies:
    """Reads the file of `write_vocabularies`. Raises WorkspaceError if it is missing."""
    table = workspace.read_parquet(f"{folder}/{VOCABULARIES}")
    fields = {
        name: table.filter(pc.equal(table["field"], name))["value"].drop_null().combine_chunks()
        for name in pc.unique(table["field"]).to_pylist()
    }

    return Vocabularies(
        items=fields["item"].cast(pa.int64()),
        values={name.removeprefix(VALUES): v for name, v in fields.items() if name.startswith(VALUES)},
        fields=FeatureSchema.model_validate_json(fields["fields"][0].as_py()),
        grades=Grades(*map(float, fields["grades"].to_pylist())),
    )


def write_items(workspace: Workspace, folder: str, items: ItemFeatures, counts: np.ndarray | None = None) -> None:
    """Writes items.safetensors. counts: features.Features.item_counts, for training only."""
    counts = np.zeros(len(items.codes), np.int64) if counts is None else counts
    arrays = {"ids": items.ids, "codes": items.codes, "attributes": items.attributes, "numbers": items.numbers}
    arrays["counts"] = counts
    workspace.write_bytes(f"{folder}/{ITEMS}", safetensors.numpy.save(arrays))


def read_items(workspace: Workspace, folder: str) -> tuple[ItemFeatures, np.ndarray]:
    """Reads the file of `write_items`. Raises WorkspaceError if it is missing or damaged."""
    try:
        arrays = safetensors.numpy.load(workspace.read_bytes(f"{folder}/{ITEMS}"))
        names = ("ids", "codes", "attributes", "numbers")
        return ItemFeatures(*(arrays[name] for name in names)), arrays["counts"]
    except (KeyError, safetensors.SafetensorError) as error:
        raise WorkspaceError(
            f"{workspace.path(folder)}: {ITEMS} is damaged ({error}). Run the stage that wrote it again."
        ) from None
