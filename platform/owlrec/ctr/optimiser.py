"""What moves a CTR model's weights: AdamW for what is dense, row-wise Adagrad for large id tables.

Row-wise Adagrad (FBGEMM's EXACT_ROWWISE_ADAGRAD, which DLRM trains with) keeps one number a row, the sum of its
gradients' mean squares, and reads and writes only the rows that a batch used: a step's time does not grow with the
table, whereas a dense gradient of 10^7 x 32 is 1.3 GB, and AdamW's two moments twice that again. Small tables stay on
AdamW, for almost every row of theirs is in every batch: see CTRConfig.sparse_above_rows.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from owlrec.ctr.experiment import CTRConfig

_EPSILON = 1e-8  # FBGEMM's default


class RowwiseAdagrad(torch.optim.Optimizer):
    """For tables [n, e] with sparse gradients: w_i -= lr * g_i / (sqrt(s_i) + eps), s_i the sum of mean(g_i^2)."""

    def __init__(self, tables: list[Tensor], lr: float) -> None:
        super().__init__(tables, {"lr": lr})
        for table in tables:
            self.state[table]["sum"] = torch.zeros(len(table), device=table.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves the rows that have a gradient. Every gradient must be sparse; its rows may repeat."""
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
    """Name -> weights of each embedding table with more than `above_rows` rows, which from now on yields sparse
    gradients.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.num_embeddings > above_rows:
            module.sparse = True
            found[f"{name}.weight"] = module.weight
    return found


def mean_over_ranks(gradient: Tensor, world_size: int) -> Tensor:
    """A table's gradient, averaged over the ranks; each sends only the rows that it touched.

    DistributedDataParallel would do so with gloo but not with NCCL, so the tables are kept from it.
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


def learning_rate_factor(step: int, total_steps: int, config: CTRConfig) -> float:
    """What the learning rates are multiplied with at `step` (0 is the first): a linear rise over warmup_steps, then 1,
    or a half cosine that would reach 0 after `total_steps`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Optimisers:
    """Both optimisers of a model, on one schedule."""

    def __init__(self, model: nn.Module, config: CTRConfig, total_steps: int, world_size: int = 1) -> None:
        self.config, self.total_steps, self.world_size = config, total_steps, world_size
        self.steps = 0  # done
        self.tables = large_tables(model, config.sparse_above_rows)
        dense = [weight for name, weight in model.named_parameters() if name not in self.tables]
        self._rates = [config.learning_rate]
        self._optimisers: list[torch.optim.Optimizer] = [
            # One kernel for all weights: foreach, the default, passes over them a dozen times.
            torch.optim.AdamW(dense, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        ]
        if self.tables:
            self._rates.append(config.table_learning_rate)
            self._optimisers.append(RowwiseAdagrad(list(self.tables.values()), config.table_learning_rate))

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for optimiser in self._optimisers:
            optimiser.zero_grad()

    def step(self) -> None:
        """One step of both. Dense gradients must be averaged over the ranks already; those of tables are here."""
        if self.world_size > 1:
            for table in self.tables.values():
                if table.grad is not None:
                    table.grad = mean_over_ranks(table.grad, self.world_size)
        factor = learning_rate_factor(self.steps, self.total_steps, self.config)
        for optimiser, rate in zip(self._optimisers, self._rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of them, beside `steps`."""
        return {
            f"{i}.{weight}.{name}": value
            for i, optimiser in enumerate(self._optimisers)
            for weight, values in optimiser.state_dict()["state"].items()
            for name, value in values.items()
        }

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Goes on from what `state` and `steps` held, of the same model and settings."""
        self.steps = steps
        for i, optimiser in enumerate(self._optimisers):
            restored: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                of, weight, name = key.split(".")
                if int(of) == i:
                    restored.setdefault(int(weight), {})[name] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": restored})
