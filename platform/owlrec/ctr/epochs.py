"""The epochs of a trial: steps, early stopping on valid, checkpoints, and going on from one.

All that a step depends on is either a function of seed and position (the order of the rows, the learning rate) or in
the checkpoint, so a trial that was killed ends with the very weights of one that was not.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice

import torch
from torch import Tensor, nn

from owlrec.ctr.batches import SplitBatches
from owlrec.ctr.checkpoint import CheckpointFile, Progress, random_states, restore_random_states
from owlrec.ctr.experiment import CTRConfig
from owlrec.ctr.model import CTRModel
from owlrec.ctr.optimiser import Optimisers
from owlrec.ctr.order import epoch_steps
from owlrec.ctr.worker import Worker

logger = logging.getLogger(__name__)

# With fewer steps an epoch, early stopping judges a model that has hardly moved: on 9,554 rows of MovieLens-100K,
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
        """sizes: rows of each shard that is trained on."""
        self.model, self.config, self.seed, self.sizes = model, config, seed, sizes
        self.worker, self.checkpoint = worker, checkpoint
        n_rows = sum(sizes)
        self.batch_size = min(config.batch_size, max(1, n_rows // _MIN_STEPS))
        steps_an_epoch = -(-n_rows // self.batch_size)
        self.optimisers = Optimisers(model, config, config.epochs * steps_an_epoch, worker.world_size)
        self.wrapped: nn.Module = model
        if worker.world_size > 1:
            # Buffers are the items' codes, the same everywhere; by default DDP sends them to all ranks at each step.
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                model, list(self.optimisers.tables)
            )
            self.wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        torch.manual_seed(seed + worker.rank)  # from here on randomness is dropout, which must differ between ranks
        self.progress = Progress()
        self.best_weights: dict[str, Tensor] = {}
        self._resume()

    def train(self, split: SplitBatches, valid_auc: Callable[[int], float]) -> Progress:
        """Trains to the end, and leaves the model with the weights of the best epoch.

        valid_auc: called after each epoch, with its number; all ranks must return the same. What it raises ends it all.
        """
        progress = self.progress
        while True:
            self._train_epoch(split)
            auc = valid_auc(progress.epoch)
            if auc > progress.best_auc:
                progress.best_auc, progress.best_epoch = auc, progress.epoch
                self.best_weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            if progress.epoch - progress.best_epoch >= self.config.patience or progress.epoch >= self.config.epochs:
                break
            progress.epoch, progress.batches = progress.epoch + 1, 0
        self.model.load_state_dict(self.best_weights)
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
                self.optimisers.zero_grad()
                loss.backward()
                self.optimisers.step()
                progress.batches, progress.steps = progress.batches + 1, progress.steps + 1
                if self.checkpoint is not None and progress.steps % self.checkpoint.every_steps == 0:
                    now = time.perf_counter()
                    progress.training_s += now - started
                    started = now
                    self._save(self.checkpoint)
        progress.training_s += time.perf_counter() - started

    def _save(self, checkpoint: CheckpointFile) -> None:
        random = random_states(self.worker)
        if self.worker.rank == 0:
            parts = {
                "model": self.model.state_dict(),
                "best": self.best_weights,
                "optimiser": self.optimisers.state(),
                "random": random,
            }
            checkpoint.save(self.progress, {f"{part}/{k}": v for part, held in parts.items() for k, v in held.items()})

    def _resume(self) -> None:
        found = self.checkpoint.load() if self.checkpoint is not None else None
        if found is None:
            return
        self.progress, tensors = found
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimiser": {}, "random": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        self.model.load_state_dict(parts["model"])
        self.best_weights = parts["best"]
        self.optimisers.restore(parts["optimiser"], self.progress.steps)
        restore_random_states(parts["random"], self.worker)
        logger.info("resumed in epoch %d, after %d batches", self.progress.epoch, self.progress.batches)
