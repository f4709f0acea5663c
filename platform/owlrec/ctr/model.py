"""The CTR model: KAR's hybrid-expert adaptor, and the whole model of embeddings, adaptor and backbone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owlrec.config import Config
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.backbones.networks import BackboneInputs, InputShape, TableRows, mlp
from owlrec.ctr.experiment import AdaptorConfig, CTRConfig, Sharing
from owlrec.ctr.features import OUTCOMES, PADDING, FeatureSpec, Field, ItemFeatures
from owlrec.ctr.knowledge_tables import SIMILARITIES, VectorTable
from owlrec.errors import SchemaError
from owlrec.ids import EVENTS

# -------------------------------------------------------------------------------------------------------------- adaptor
# The hybrid-expert adaptor of KAR (RecSys 2024, sec. 3.3): turns encoder vectors into two fields of the backbone.
#
# Each tower (user, item) mixes experts by a softmax gate over its input: some are shared between the towers, some are
# its own. An expert is d -> hidden_dim -> e with a ReLU after both, so its output is never negative. Missing knowledge
# is a learned default vector in place of the input, so gate and experts can learn what "unknown" means. Inputs are
# scaled to length one, so encoders of any scale train alike; LayerNorm instead cost valid AUC on MovieLens-100K (DIN
# .7645 to .7637, DCN-V2 .7641 to .7618; metadata vectors, mean of three user splits).
#
# Each source of a side (individual and collective knowledge, likes and dislikes) has a tower and a field of its own, so
# that a backbone tells them apart. A user's interest partitions are one source: they are fused before the experts by
# attention, as in LIBER (arXiv 2411.14713, User Interest Fusion).


# -------------------------------------------------------------------------------------------------------------- codes
# Semantic ids as categorical features: one field per prefix (c1, c1c2, c1c2c3), from coarse to fine.
#
# Vectors with a common prefix are alike, so a prefix's embedding is shared by all that are alike on that level; a sum
# over single codes could only be a linear function of the decoded vector. Missing knowledge has an embedding on each
# level. An item's prefixes are fields of the item, as its attributes are: the target has them, and so has each behavior
# of the history. A user's are knowledge fields.


PREFIX_ROWS = 1 << 16  # of a level's table; more prefixes share rows by a hash
_HASH = 0x9E3779B97F4A7C15 - (1 << 64)  # Fibonacci hashing, as a signed number


@dataclass(frozen=True)
class Codes:
    """Semantic ids of one side of a batch, each distinct id once."""

    values: Tensor  # int64 [u, levels], codes plus one; 0 where an id has no knowledge
    rows: Tensor  # int64 [b]: each row's index among the u ids


class PrefixFields(nn.Module):
    """The embeddings of one side's prefixes."""

    def __init__(self, sizes: Sequence[int], dim: int, *, init_std: float) -> None:
        """sizes: number of codes per level."""
        super().__init__()
        self.sizes = tuple(sizes)
        prefixes = [math.prod(sizes[: level + 1]) for level in range(len(sizes))]
        self.rows = [min(n, PREFIX_ROWS) for n in prefixes]
        self.hashed = [n > PREFIX_ROWS for n in prefixes]
        tables = [nn.Embedding(rows + 1, dim) for rows in self.rows]  # row 0: missing
        for table in tables:
            nn.init.normal_(table.weight, std=init_std)
        self.tables = nn.ModuleList(tables)

    def forward(self, values: Tensor) -> Tensor:
        """float32 [..., levels, dim]. values: int64 [..., levels], see Codes."""
        fields, prefix = [], torch.zeros_like(values[..., 0])
        known = values[..., 0] > 0
        for level, (table, size) in enumerate(zip(self.tables, self.sizes, strict=True)):
            prefix = prefix * size + (values[..., level] - 1).clamp(min=0)
            row = prefix
            if self.hashed[level]:
                row = ((prefix * _HASH) >> 32).remainder(self.rows[level])
            fields.append(table(torch.where(known, row + 1, 0)))
        return torch.stack(fields, dim=-2)


def code_sizes(tables: Sequence[VectorTable]) -> tuple[int, ...]:
    """Number of codes on each level of a side's first source; () for a side without knowledge. Raises SchemaError if
    its table has none.
    """
    if not tables:
        return ()
    table = tables[0]
    if not table.code_sizes:
        raise SchemaError(
            "ctr.arms: an arm with codes reads vectors without semantic ids. Set encoder.semantic_ids in the "
            "recipe and run `encode` again, or remove the arm."
        )
    return table.code_sizes


# -------------------------------------------------------------------------------------------------------------- adaptor


# It yields one number per slot, and a source has at most four. As wide as the layer with which DIN scores a behavior.
FUSION_DIM = 16


# Training spends most of the adaptor's time in the first layers. On CPUs with AVX512-BF16 they take a third of the time
# in bfloat16; the vectors are stored in half precision anyway. Scores always use float32.
_HALF_ON_CPU = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


@dataclass(frozen=True)
class BatchVectors:
    """Vectors of one side of a batch, each distinct id once: the adaptor's work grows with ids, not with rows."""

    vectors: Tensor  # float32 [u, s, d], one per slot
    mask: Tensor  # bool [u, s], False if an id has no knowledge for a slot
    rows: Tensor  # int64 [b]: each row's index among the u ids


class Experts(nn.Module):
    """n experts, each in_dim -> hidden_dim -> out_dim. `Layers` evaluates several such groups at once."""

    def __init__(self, n: int, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_dim, n * hidden_dim)
        bound = hidden_dim**-0.5  # the range of nn.Linear's initial weights
        self.weight = nn.Parameter(torch.empty(n, hidden_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, out_dim).uniform_(-bound, bound))


class Layers(NamedTuple):
    """Several groups of experts and their gate, joined: each layer of n experts is one product."""

    first: Tensor  # float32 [n * hidden_dim + n, in_dim]: the first layers, then the gate
    first_bias: Tensor
    weight: Tensor  # float32 [n, hidden_dim, out_dim]
    bias: Tensor  # float32 [n, out_dim]

    @classmethod
    def joined(cls, groups: Sequence[Experts], gate: nn.Linear) -> "Layers":
        """gate: one output per expert, in the groups' order."""
        layers = [*(group.first for group in groups), gate]  # all read the same input
        first, first_bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        return cls(first, first_bias, torch.cat([g.weight for g in groups]), torch.cat([g.bias for g in groups]))

    def read(self, x: Tensor, *, half: bool = False) -> Tensor:
        """First layers and gate applied to x: float32 [b, in_dim]. half: multiplies in bfloat16, adds in float32."""
        if half:
            return F.linear(x.bfloat16(), self.first.bfloat16()).float() + self.first_bias
        return F.linear(x, self.first, self.first_bias)

    def mixed(self, read: Tensor) -> Tensor:
        """float32 [b, out_dim], not negative: the outputs of all experts, weighted by the gate's softmax. read: output
        of `read`.
        """
        n, hidden_dim, _ = self.weight.shape
        hidden, logits = read.split([n * hidden_dim, n], dim=1)
        by_expert = hidden.relu().unflatten(1, (n, hidden_dim)).transpose(0, 1)
        outputs = torch.baddbmm(self.bias.unsqueeze(1), by_expert, self.weight).relu()
        return (outputs * torch.softmax(logits, dim=1).T.unsqueeze(2)).sum(0)


class Fusion(nn.Module):
    """Additive attention over a source's slots: weights softmax_i(q . tanh(W x_i + e_i)), with e_i per slot.

    The fused vector is the weighted sum of the slots' vectors, so it is in the encoder's space, like a single one.
    """

    def __init__(self, slots: int, dim: int) -> None:
        super().__init__()
        self.key = nn.Linear(dim, FUSION_DIM, bias=False)  # its bias is the slot's embedding
        bound = FUSION_DIM**-0.5
        self.slots = nn.Parameter(torch.empty(slots, FUSION_DIM).uniform_(-bound, bound))
        self.query = nn.Parameter(torch.empty(FUSION_DIM).uniform_(-bound, bound))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """float32 [b, dim], zeros without knowledge. x: float32 [b, s, dim], zeros where the mask is False;
        mask: bool [b, s].
        """
        scores = torch.tanh(self.key(x) + self.slots) @ self.query
        weights = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=1)
        return torch.einsum("bs,bsd->bd", weights, x)


class Tower(nn.Module):
    """Gate, dedicated experts, default vector and fusion of one source; the shared experts are passed in.

    One slot needs neither fusion nor parameters for it.
    """

    def __init__(self, in_dim: int, out_dim: int, config: AdaptorConfig, slots: int = 1) -> None:
        super().__init__()
        self.slots = slots
        self.default = nn.Parameter(torch.randn(in_dim) * in_dim**-0.5)  # length about 1, like the vectors
        self.gate = nn.Linear(in_dim, config.shared_experts + config.dedicated_experts)
        self.experts = Experts(config.dedicated_experts, in_dim, config.hidden_dim, out_dim)
        self.fusion = Fusion(slots, in_dim) if slots > 1 else None

    def fused(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """float32 [b, in_dim], the input of gate and experts for each id: zeros without knowledge.

        Arguments: see `forward`.
        """
        # Values in place of missing vectors must not reach a gradient.
        x = F.normalize(torch.where(mask.unsqueeze(2), vectors, 0.0), dim=2)
        return x[:, 0] if self.fusion is None else self.fusion(x, mask)

    def forward(self, vectors: Tensor, mask: Tensor, shared: Experts) -> Tensor:
        """float32 [b, out_dim]. vectors: float32 [b, slots, in_dim]; mask: bool [b, slots], False where missing."""
        x, layers = self.fused(vectors, mask), Layers.joined((shared, self.experts), self.gate)
        # The learned default is added after the first layer: before it, all of x would need a gradient, too.
        read = layers.read(x, half=self.training and _HALF_ON_CPU and x.device.type == "cpu")
        mixed = layers.mixed(torch.cat([read, layers.read(self.default[None])]))
        return torch.where(mask.any(dim=1, keepdim=True), mixed[:-1], mixed[-1])


class TrainedTowers:
    """One side's trained towers with their layers joined once, which is most of the work for the few ids of a
    request.
    """

    def __init__(self, towers: Sequence[Tower], shared: Experts) -> None:
        self._towers = towers
        with torch.inference_mode():
            self._layers = [Layers.joined((shared, tower.experts), tower.gate) for tower in towers]
            self._defaults = [
                layers.mixed(layers.read(tower.default[None]))
                for tower, layers in zip(towers, self._layers, strict=True)
            ]

    def __call__(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """float32 [b, towers * out_dim]. Arguments: see Adaptor.side."""
        slots = [tower.slots for tower in self._towers]
        parts = zip(
            self._towers, self._layers, self._defaults, vectors.split(slots, 1), mask.split(slots, 1), strict=True
        )
        fields = []
        for tower, layers, default, tower_vectors, tower_mask in parts:
            mixed = layers.mixed(layers.read(tower.fused(tower_vectors, tower_mask)))
            fields.append(torch.where(tower_mask.any(dim=1, keepdim=True), mixed, default))
        return torch.cat(fields, dim=1)


class Adaptor(nn.Module):
    """The towers over vectors of one encoder: more fields for your own model, one per source.

    >>> import torch
    >>> import owlrec
    >>> adaptor = owlrec.Adaptor(dim=384, width=16)
    >>> users, items = torch.randn(8, 384), torch.randn(8, 384)
    >>> known = torch.tensor([True] * 7 + [False])  # the last user has no vector: a learned default replaces it
    >>> adaptor(users, items, masks=(known, torch.ones(8, dtype=torch.bool))).shape
    torch.Size([8, 2, 16])
    """

    def __init__(
        self,
        dim: int,
        width: int,
        config: AdaptorConfig | None = None,
        user_slots: Sequence[int] = (1,),
        item_slots: Sequence[int] = (1,),
    ) -> None:
        """dim: components of a vector. width: of a field, the same as the model's embeddings. *_slots: vectors of each
        source, fused by attention if there are several; () for a side without knowledge.
        """
        super().__init__()
        config = config or AdaptorConfig()
        self.shared = Experts(config.shared_experts, dim, config.hidden_dim, width)
        self.user, self.item = (
            nn.ModuleList(Tower(dim, width, config, n) for n in slots) for slots in (user_slots, item_slots)
        )

    def forward(self, user_vectors: Tensor, item_vectors: Tensor, masks: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """float32 [b, fields, width]: per row, the user's fields, then the item's.

        *_vectors: float32 [b, dim], or [b, slots, dim] for several. masks: for users and items, bool [b] or
        [b, slots], False for missing knowledge; by default, all-zero vectors are missing. Pass the output of
        `Release.vectors` for a batch's ids, as tensors.
        """
        user_mask, item_mask = masks or (user_vectors.any(-1), item_vectors.any(-1))
        return self.fields(_each_row(user_vectors, user_mask), _each_row(item_vectors, item_mask))

    def side(self, towers: nn.ModuleList, vectors: Tensor, mask: Tensor) -> Tensor:
        """float32 [b, towers * width]. towers: `user` or `item`; vectors: float32 [b, slots, dim]; mask: bool [b,
        slots]. Raises ValueError for another number of slots.
        """
        slots = [cast(Tower, tower).slots for tower in towers]
        if vectors.shape[1] != sum(slots):
            raise ValueError(f"{vectors.shape[1]} vectors per id, but these towers were built for {sum(slots)}.")
        parts = zip(towers, vectors.split(slots, dim=1), mask.split(slots, dim=1), strict=True)
        return torch.cat([tower(part, part_mask, self.shared) for tower, part, part_mask in parts], dim=1)

    def fields(self, user: BatchVectors | None, item: BatchVectors | None) -> Tensor:
        """The same for batches with repeated ids: float32 [b, fields, width]. None: a side without knowledge."""
        sides = [(self.user, user), (self.item, item)]
        fields = [
            # An embedding's gradient is several times faster than that of indexing.
            F.embedding(given.rows, self.side(towers, given.vectors, given.mask)).unflatten(1, (len(towers), -1))
            for towers, given in sides
            if given is not None
        ]
        return torch.cat(fields, dim=1)


def _each_row(vectors: Tensor, mask: Tensor) -> BatchVectors:
    if vectors.dim() == 2:
        vectors, mask = vectors.unsqueeze(1), mask.unsqueeze(1)
    return BatchVectors(vectors, mask, torch.arange(len(vectors), device=vectors.device))


# ---------------------------------------------------------------------------------------------------------------- model
# A complete CTR model: embeddings, the adaptor if the arm has knowledge, and a backbone.
#
# Items and ids repeat within a batch (a popular item is in hundreds of histories). So each distinct item is embedded
# once and each distinct id passes the adaptor once; rows then gather the results. The numbers are the same, for
# several times less work.


# Small, so an item rarely seen in training stays near zero: .01 beats .05 by .002 valid AUC on MovieLens-100K.
_INIT_STD = 0.01


# Of a backbone's layers: none, as chosen on the valid AUC of MovieLens-100K. Early stopping keeps from overfitting.
DROPOUT = 0.0


class ModelSpec(Config):
    """Everything a model is built from. With its weights, it is all that a serving process needs."""

    features: FeatureSpec
    backbone: str
    knowledge_dim: int  # components of a knowledge vector; 0 builds no adaptor
    embed_dim: int
    hidden_dims: tuple[int, ...]
    expert_dim: int  # of the adaptor
    sharing: Sharing | None = None  # the network of several labels
    # Vectors of each source; () for a side without knowledge.
    user_slots: tuple[int, ...] = (1,)
    item_slots: tuple[int, ...] = (1,)
    # Number of codes per level of the semantic ids; empty if they are not read.
    user_codes: tuple[int, ...] = ()
    item_codes: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        features: FeatureSpec,
        backbone: str,
        knowledge_dim: int,
        config: CTRConfig,
        *,
        user_slots: tuple[int, ...] = (1,),
        item_slots: tuple[int, ...] = (1,),
        user_codes: tuple[int, ...] = (),
        item_codes: tuple[int, ...] = (),
    ) -> "ModelSpec":
        """The model specified by `config`."""
        return cls(
            features=features,
            backbone=backbone,
            knowledge_dim=knowledge_dim,
            embed_dim=config.embed_dim,
            hidden_dims=config.hidden_dims,
            expert_dim=config.expert_dim,
            sharing=config.sharing,
            user_slots=user_slots,
            item_slots=item_slots,
            user_codes=user_codes,
            item_codes=item_codes,
        )

    @property
    def user_fields(self) -> int:
        """Fields of a user's knowledge: one per source of vectors, then one per prefix of the semantic id."""
        return len(self.user_slots) * bool(self.knowledge_dim) + len(self.user_codes)

    @property
    def item_vector_fields(self) -> int:
        """Fields of an item's vectors, one per source."""
        return len(self.item_slots) * bool(self.knowledge_dim)

    @property
    def has_product(self) -> bool:
        """Whether the product of the user's and the item's fields is a field: both sides have vectors."""
        return bool(self.knowledge_dim and self.user_slots and self.item_slots)

    @property
    def knowledge_fields(self) -> int:
        """Fields of `BackboneInputs.knowledge`: the user's, the item's vectors, their product, the similarities."""
        return self.user_fields + self.item_vector_fields + self.has_product + bool(self.item_vector_fields)


@dataclass(frozen=True)
class DistinctItems:
    """The u distinct items among a batch's targets and behaviors."""

    rows: Tensor  # int64 [u], row numbers of ItemFeatures
    target_rows: Tensor  # int64 [b]: each target's index among the u
    history_rows: Tensor  # int64 [b, L]
    codes: Tensor | None = None  # int64 [u, levels]: semantic ids, see Codes; an item with two texts is here twice

    @classmethod
    def of(cls, items: np.ndarray, history: np.ndarray, codes: "DistinctCodes | None" = None) -> "DistinctItems":
        """items: int [b], history: int [b, L]. Computed on the CPU: on a GPU the step would wait for the count."""
        import pandas as pd  # here, so that the base install misses torch first and names the extra that has both

        rows = np.concatenate([items, history.reshape(-1)]).astype(np.int64)
        keys = rows if codes is None else rows * len(codes.values) + codes.places
        where, distinct = pd.factorize(keys, sort=True)
        target_rows, history_rows = np.split(where.astype(np.int64), [len(items)])
        values = None
        if codes is not None:
            values = torch.from_numpy(codes.values[distinct % len(codes.values)])
            distinct = distinct // len(codes.values)
        arrays = (distinct, target_rows, history_rows.reshape(history.shape))
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        return cls(tensors[0], tensors[1], tensors[2], values)


@dataclass(frozen=True)
class DistinctCodes:
    """Semantic ids of a batch's targets, followed by those of its behaviors."""

    values: np.ndarray  # int64 [v, levels]: see Codes; at least one row
    places: np.ndarray  # int64 [b + b * L], each one's row of `values`


@dataclass(frozen=True)
class Batch:
    """Codes of b rows, and their knowledge if the model reads any. L: history length.

    history, ratings, fields, numbers, events and history_codes have one row if all rows belong to one user's request.
    """

    items: Tensor  # int64 [b], row numbers of ItemFeatures
    history: Tensor  # int64 [b or 1, L], row numbers, 0 for padding
    ratings: Tensor  # int64 [b or 1, L]
    fields: Tensor  # int64 [b or 1, coded fields of the sample, width]: see SampleFeatures
    numbers: Tensor  # float32 [b or 1, log fields of the sample]
    events: Tensor | None = None  # int64 [b or 1, L], if behaviors have them
    user: BatchVectors | None = None
    item: BatchVectors | None = None
    similarities: Tensor | None = None  # float32 [b, item sources * SIMILARITIES]: similarity_features of each source
    user_codes: Codes | None = None  # if the model reads semantic ids of users
    item_codes: Tensor | None = None  # int64 [b, levels], see Codes; without `distinct`, which has them
    history_codes: Tensor | None = None  # int64 [b or 1, L, levels]
    distinct: DistinctItems | None = None  # for batches with many rows; a request's items rarely repeat
    # float32 [b, user_fields + item_vector_fields, e]: precomputed, the user's first; replaces user, item, user_codes
    adaptor_fields: Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------- tasks
# Several labels of one sample (click and conversion): networks over all fields, with one output per label.
#
# A backbone gives one logit, the same for all labels up to a learned weight; what differs between labels is the task of
# the networks beside it: a shared bottom (Caruana 1997), a mixture of experts with a gate per label (MMoE, Ma et al.,
# KDD 2018) or experts of all labels beside those of each, in two layers (PLE, Tang et al., RecSys 2020).


EXPERTS = 4  # of MMoE
PLE_EXPERTS = 2  # shared by all labels, and of each label


class Mixture(nn.Module):
    """Experts, one layer each, mixed by the softmax of a gate."""

    def __init__(self, n: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layer, self.shape = nn.Linear(in_dim, n * out_dim), (n, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [b, n, out_dim], not negative. x: float32 [b, in_dim]."""
        return self.layer(x).relu().unflatten(1, self.shape)


def mixed(gate: nn.Module, x: Tensor, experts: Tensor) -> Tensor:
    """float32 [b, out_dim]. x: the gate's input, float32 [b, in_dim]; experts: float32 [b, n, out_dim]."""
    return torch.einsum("bn,bnd->bd", torch.softmax(gate(x), dim=1), experts)


class SharedBottom(nn.Module):
    """One network, with a layer per label on top."""

    def __init__(self, tasks: int, in_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.bottom = mlp(in_dim, hidden_dims, DROPOUT)
        self.towers = nn.Linear(hidden_dims[-1], tasks)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [b, tasks]: logits. x: float32 [b, in_dim]."""
        logits: Tensor = self.towers(self.bottom(x))
        return logits


class MMoE(nn.Module):
    """Experts shared by all labels, with a gate and a tower per label."""

    def __init__(self, tasks: int, in_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.experts = Mixture(EXPERTS, in_dim, hidden_dims[0])
        self.gates = nn.ModuleList(nn.Linear(in_dim, EXPERTS) for _ in range(tasks))
        self.towers = nn.ModuleList(mlp(hidden_dims[0], hidden_dims[1:], DROPOUT, out_dim=1) for _ in range(tasks))

    def forward(self, x: Tensor) -> Tensor:
        """See SharedBottom."""
        experts = self.experts(x)
        each = zip(self.gates, self.towers, strict=True)
        return torch.cat([tower(mixed(gate, x, experts)) for gate, tower in each], dim=1)


class PLE(nn.Module):
    """Two layers of experts: in the first the shared part sees the experts of all labels, in the second each label its
    own and the shared ones.
    """

    def __init__(self, tasks: int, in_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        first, second = hidden_dims[0], hidden_dims[min(1, len(hidden_dims) - 1)]
        n = PLE_EXPERTS
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "experts": nn.ModuleList(Mixture(n, width, out) for _ in range(tasks + 1)),  # the shared ones last
                    "gates": nn.ModuleList(nn.Linear(width, 2 * n) for _ in range(tasks)),
                }
            )
            for width, out in ((in_dim, first), (first, second))
        )
        self.shared_gate = nn.Linear(in_dim, n * (tasks + 1))
        self.towers = nn.ModuleList(mlp(second, hidden_dims[2:], DROPOUT, out_dim=1) for _ in range(tasks))

    def forward(self, x: Tensor) -> Tensor:
        """See SharedBottom."""
        states = [x] * (len(self.towers) + 1)
        for layer in self.layers:
            experts = [own(state) for own, state in zip(layer["experts"], states, strict=True)]  # type: ignore[index]
            gates = layer["gates"]  # type: ignore[index]
            new = [
                mixed(gate, state, torch.cat([own, experts[-1]], dim=1))
                for gate, state, own in zip(gates, states, experts, strict=False)
            ]
            states = [*new, mixed(self.shared_gate, x, torch.cat(experts, dim=1)) if states[-1] is x else new[0]]
        return torch.cat([tower(state) for tower, state in zip(self.towers, states, strict=False)], dim=1)


class TaskHeads(nn.Module):
    """Logits of all labels from a backbone's and from all fields."""

    NETWORKS: ClassVar = {"shared": SharedBottom, "mmoe": MMoE, "ple": PLE}

    def __init__(self, sharing: Sharing, tasks: int, in_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.network = self.NETWORKS[sharing](tasks, in_dim, hidden_dims)
        self.weights = nn.Parameter(torch.ones(tasks))  # of the backbone's logit

    def forward(self, logit: Tensor, fields: Tensor) -> Tensor:
        """float32 [b, tasks]. logit: float32 [b]; fields: float32 [b, n_fields, e]."""
        logits: Tensor = logit[:, None] * self.weights + self.network(fields.flatten(1))
        return logits


# --------------------------------------------------------------------------------------------------------------- fields


class FieldEmbeddings(nn.Module):
    """Fields from codes and numbers. A multi-valued field is the mean of its values; a number on a log scale is
    x w + b with a vector w and b per field, and a vector in place of a missing one.
    """

    def __init__(self, fields: Sequence[Field], tables: Sequence[str], dim: int) -> None:
        """tables: names of the embedding tables, in the order in which `forward` receives them."""
        super().__init__()
        self._coded = [(tables.index(f.table), f.width) for f in fields if f.type != "log"]
        n = len(fields) - len(self._coded)
        # DistributedDataParallel refuses parameters without a gradient, so without numbers there are none.
        self.reads_codes, self.reads_numbers, self._dim = bool(self._coded), n > 0, dim
        if n:
            self.scale, self.bias, self.missing = (nn.Parameter(torch.randn(n, dim) * _INIT_STD) for _ in range(3))

    def forward(self, tables: nn.ModuleList, codes: Tensor, numbers: Tensor) -> Tensor:
        """float32 [b, fields, dim]: coded ones, then numbers. codes: int64 [b, coded, width], 0 is padding; numbers:
        float32 [b, log], NaN if missing.
        """
        parts: list[Tensor] = []
        for at, (table, width) in enumerate(self._coded):
            if width == 1:
                parts.append(tables[table](codes[:, at, 0]))
                continue
            values = codes[:, at, :width]
            n_values = (values != PADDING).sum(1, keepdim=True).clamp(min=1)
            parts.append(tables[table](values).sum(1) / n_values)
        coded = torch.stack(parts, dim=1) if parts else numbers.new_zeros(len(codes), 0, self._dim)
        if not self.reads_numbers:
            return coded
        known = ~numbers.isnan().unsqueeze(2)
        scaled = numbers.nan_to_num().unsqueeze(2) * self.scale + self.bias
        return torch.cat([coded, torch.where(known, scaled, self.missing)], dim=1)


class ShardedTable(nn.Module):
    """An embedding table whose rows are shared out among the workers of the default group (TorchRec, row-wise), trained
    by FBGEMM's EXACT_ROWWISE_ADAGRAD in the backward pass: no worker ever holds the whole table.

    All workers must call `forward` equally often. Its weights are outside `parameters` and `state_dict`: each worker
    has its own (`local`).
    """

    def __init__(self, rows: int, dim: int, learning_rate: float, device: str) -> None:
        """Needs TorchRec (the extra `torchrec`)."""
        super().__init__()
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec import EmbeddingCollection, EmbeddingConfig
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingEnv

        self.shape = (rows, dim)
        config = EmbeddingConfig(
            name=_ROWS, embedding_dim=dim, num_embeddings=rows, feature_names=[_ROWS], init_fn=_small_normal
        )
        whole = EmbeddingCollection(tables=[config], device=torch.device("meta"))
        optimizer = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": learning_rate, "eps": 1e-8}
        sharder, group = EmbeddingCollectionSharder(fused_params=optimizer), torch.distributed.group.WORLD
        world_size, kind = torch.distributed.get_world_size(), torch.device(device).type
        plan = construct_module_sharding_plan(
            whole,
            {_ROWS: row_wise(compute_kernel="fused")},
            sharder=sharder,
            world_size=world_size,
            local_size=world_size,
            device_type=kind,
        )
        sharded = sharder.shard(whole, plan, ShardingEnv.from_process_group(group), device=torch.device(device))
        self._sharded = (sharded,)  # in a tuple, so that it is not a submodule: neither AdamW nor DDP may see it

    @property
    def local(self) -> dict[str, Tensor]:
        """This worker's rows [n, dim] and their sums of Adagrad [n], as they are in training."""
        (sharded,) = self._sharded
        ((rows,), (sums,)) = (
            _local(values) for values in (sharded.state_dict(), sharded.fused_optimizer.state_dict()["state"])
        )
        return {"rows": rows, "sums": sums}

    def load(self, table: Tensor, rank: int) -> None:
        """Takes this worker's rows of a whole table. table: float32 [rows, dim]."""
        mine = self.local["rows"]
        per_worker = -(-self.shape[0] // torch.distributed.get_world_size())
        mine.copy_(table[rank * per_worker :][: len(mine)])

    def gathered(self, rank: int) -> Tensor | None:
        """The whole table on rank 0, float32 [rows, dim] on the CPU; None elsewhere. All workers must call it."""
        mine = self.local["rows"]
        world_size = torch.distributed.get_world_size()
        per_worker = -(-self.shape[0] // world_size)
        padded = F.pad(mine, (0, 0, 0, per_worker - len(mine)))
        parts = [torch.empty_like(padded) for _ in range(world_size)] if rank == 0 else None
        torch.distributed.gather(padded, parts)
        return None if parts is None else torch.cat(parts)[: self.shape[0]].float().cpu()

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [..., dim], zeros for padding. ids: int64."""
        from torchrec import KeyedJaggedTensor

        flat = ids.flatten()
        asked = KeyedJaggedTensor(keys=[_ROWS], values=flat, lengths=flat.new_tensor([len(flat)]))
        (sharded,) = self._sharded
        rows: Tensor = sharded(asked)[_ROWS].values()
        return (rows * (flat != PADDING).unsqueeze(1)).unflatten(0, ids.shape)


_ROWS = "rows"  # name of a sharded table and its feature


def _small_normal(weights: Tensor) -> None:
    nn.init.normal_(weights, std=_INIT_STD)


def _local(state: Mapping[str, Any]) -> list[Tensor]:
    """Local tensors of the ShardedTensors in a state of TorchRec."""
    flat = [v for value in state.values() for v in (value.values() if isinstance(value, Mapping) else [value])]
    return [value.local_shards()[0].tensor for value in flat]


class CTRModel(nn.Module):
    """Embeddings, adaptor and backbone.

    The items' codes are buffers outside the weights file, because they follow from the item table.
    """

    item_codes: Tensor
    item_attributes: Tensor
    item_numbers: Tensor
    all_ratings: Tensor
    all_events: Tensor

    def __init__(
        self, spec: ModelSpec, items: ItemFeatures, table: Callable[[int, int], nn.Module] | None = None
    ) -> None:
        """table: makes the embeddings of an id or a feature from rows and width; by default an nn.Embedding."""
        super().__init__()
        self.spec = spec
        table = table or plain_table
        self.register_buffer("item_codes", torch.from_numpy(items.codes.astype(np.int64)), persistent=False)
        # Only those with columns: torch.export (2.13) cannot save two empty buffers.
        for name, array in (("item_attributes", items.attributes.astype(np.int64)), ("item_numbers", items.numbers)):
            if array.size:
                self.register_buffer(name, torch.from_numpy(array), persistent=False)
        features, width = spec.features, spec.embed_dim
        fields = features.fields
        self.item = table(features.n_items, width)
        self.tables = nn.ModuleList(table(size, width) for size in features.tables.values())
        self.item_features = FieldEmbeddings(fields.items, list(features.tables), width)
        self.row_features = FieldEmbeddings(fields.row_fields, list(features.tables), width)
        self.rating = plain_table(OUTCOMES, width)
        self.register_buffer("all_ratings", torch.arange(OUTCOMES), persistent=False)
        self.event = plain_table(len(EVENTS) + 1, width) if fields.events else None
        self.register_buffer("all_events", torch.arange(len(EVENTS) + 1), persistent=False)
        item_fields = 1 + len(fields.items) + len(spec.item_codes)
        shape = InputShape(
            item_fields=item_fields,
            side_fields=1 + fields.events,
            profile_fields=len(fields.row_fields) + item_fields * len(fields.sequences),
            knowledge_fields=spec.knowledge_fields,
            embed_dim=width,
        )
        self.backbone = BACKBONES.load(spec.backbone)(shape, hidden_dims=spec.hidden_dims, dropout=DROPOUT)
        self.heads = (
            TaskHeads(spec.sharing, 1 + len(fields.tasks), shape.n_fields * width, spec.hidden_dims)
            if spec.sharing
            else None
        )
        adaptor = AdaptorConfig(hidden_dim=spec.expert_dim)
        self.adaptor = (
            Adaptor(spec.knowledge_dim, width, adaptor, spec.user_slots, spec.item_slots)
            if spec.knowledge_dim
            else None
        )
        self.similarity = nn.Linear(len(spec.item_slots) * SIMILARITIES, width) if spec.item_vector_fields else None
        self.user_prefixes, self.item_prefixes = (
            PrefixFields(sizes, width, init_std=_INIT_STD) if sizes else None
            for sizes in (spec.user_codes, spec.item_codes)
        )

    @property
    def sharded_tables(self) -> dict[str, ShardedTable]:
        """Tables shared out among workers, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, ShardedTable)}

    def forward(self, batch: Batch) -> Tensor:
        """float32 [b]: logits; with further labels [b, 1 + tasks], the primary one first.

        Raises ValueError if the model has an adaptor and the batch has no knowledge, or another number of sources.
        """
        target, history, behaviors = self._embedded(batch)
        inputs = BackboneInputs(
            target=target,
            history=history,
            mask=batch.history != PADDING,
            profile=self.row_features(self.tables, batch.fields, batch.numbers),
            knowledge=self.knowledge(batch),
            behaviors=behaviors,
        )
        inputs = replace(inputs, profile=torch.cat([inputs.profile, *self._sequences(batch, inputs)], 1))
        logit: Tensor = self.backbone(inputs)
        return logit if self.heads is None else self.heads(logit, inputs.fields())

    def _sequences(self, batch: Batch, inputs: BackboneInputs) -> list[Tensor]:
        """Mean of the behaviors with a sequence's events, float32 [b or 1, item_fields, e] for each."""
        pooled: list[Tensor] = []
        for events in self.spec.features.fields.sequences.values():
            if batch.events is None:
                raise ValueError("this model reads sequences of events, so its batches need the events of behaviors.")
            chosen = torch.stack([batch.events == event for event in events]).any(0) & inputs.mask
            weights = chosen.to(inputs.target.dtype)
            mean = inputs.sum_history(weights / weights.sum(1, keepdim=True).clamp(min=1))
            pooled.append(mean[:, : inputs.target.shape[1]])
        return pooled

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor, TableRows | None]:
        """Targets, behaviors, and behaviors as table rows, as in BackboneInputs."""
        if batch.distinct is None:
            target = self.embed_items(batch.items, batch.item_codes)
            codes = None if batch.history_codes is None else batch.history_codes.flatten(0, 1)
            history = self.embed_items(batch.history.flatten(), codes)
            return target, self._with_outcomes(history, batch), None
        target_rows, history_rows = batch.distinct.target_rows, batch.distinct.history_rows.flatten()
        distinct = self.embed_items(batch.distinct.rows, batch.distinct.codes)
        flat = distinct.flatten(1)
        tables, rows_of_tables = [flat, self.rating(self.all_ratings)], [batch.distinct.history_rows, batch.ratings]
        if self.event is not None and batch.events is not None:
            tables.append(self.event(self.all_events))
            rows_of_tables.append(batch.events)
        behaviors = TableRows(tuple(tables), tuple(rows_of_tables))
        target = F.embedding(target_rows, flat).unflatten(1, distinct.shape[1:])
        if not self.backbone.reads_behaviors:
            n_fields = distinct.shape[1] + len(tables) - 1
            return target, target.new_empty(len(target), 0, n_fields, distinct.shape[2]), behaviors
        history = F.embedding(history_rows, flat).unflatten(1, distinct.shape[1:])
        return target, self._with_outcomes(history, batch), behaviors

    def _with_outcomes(self, history: Tensor, batch: Batch) -> Tensor:
        side = [self.rating(batch.ratings).unsqueeze(2)]
        if self.event is not None:
            if batch.events is None:
                raise ValueError("this model reads events of behaviors, so its batches need them.")
            side.append(self.event(batch.events).unsqueeze(2))
        return torch.cat([history.unflatten(0, batch.history.shape), *side], dim=2)

    def embed_items(self, rows: Tensor, codes: Tensor | None = None) -> Tensor:
        """float32 [u, item_fields, embed_dim]: the id, then the features, then the prefixes of the semantic id.

        rows: int64 [u]; codes: int64 [u, levels], if the model reads semantic ids of items. Raises ValueError if they
        are missing.
        """
        embedded = self.item(self.item_codes[rows]).unsqueeze(1)
        if self.spec.features.fields.items:
            none = embedded[:, :0, 0]
            values = self.item_attributes[rows] if self.item_features.reads_codes else none
            numbers = self.item_numbers[rows] if self.item_features.reads_numbers else none
            embedded = torch.cat([embedded, self.item_features(self.tables, values, numbers)], dim=1)
        if self.item_prefixes is None:
            return embedded
        if codes is None:
            raise ValueError("this model reads semantic ids, so its batches need codes of items and histories.")
        return torch.cat([embedded, self.item_prefixes(codes)], dim=1)

    def knowledge(self, batch: Batch) -> Tensor | None:
        """float32 [b, knowledge_fields, e]: see ModelSpec; None for an arm without knowledge.

        A match of user and item is a product, which a layer over concatenated fields learns slowly: in the planted
        world of benchmarks/planted.py DIN found 78 % and DIEN 48 % of it without the product, so it is a field.
        """
        fields = self.adaptor_fields(batch)
        if fields is None:
            return None
        spec, parts = self.spec, [fields]
        if spec.has_product:
            user, item = fields[:, : len(spec.user_slots)], fields[:, spec.user_fields :]
            parts.append((user.sum(1) * item.sum(1)).unsqueeze(1))
        if self.similarity is not None:
            if batch.similarities is None:
                raise ValueError("this model reads vectors of items, so its batches need similarities.")
            parts.append(self.similarity(batch.similarities).unsqueeze(1))
        return torch.cat(parts, dim=1)

    def adaptor_fields(self, batch: Batch) -> Tensor | None:
        """float32 [b, user_fields + item_vector_fields, e]: the user's fields, then the item's; None without any."""
        if batch.adaptor_fields is not None:
            return batch.adaptor_fields
        spec, parts = self.spec, []
        if self.adaptor is not None:
            given = (batch.user is not None, batch.item is not None)
            if given != (bool(spec.user_slots), bool(spec.item_slots)):
                raise ValueError("this model has an adaptor, so its batches need its knowledge of users and items.")
            parts += self.adaptor.fields(batch.user, batch.item).split(
                [n for n in (len(spec.user_slots), len(spec.item_slots)) if n], dim=1
            )
        if self.user_prefixes is not None:
            if batch.user_codes is None:
                raise ValueError("this model reads semantic ids, so its batches need codes of users.")
            codes = self.user_prefixes(batch.user_codes.values)
            embedded = F.embedding(batch.user_codes.rows, codes.flatten(1)).unflatten(1, codes.shape[1:])
            parts.insert(bool(self.adaptor is not None and spec.user_slots), embedded)
        return torch.cat(parts, dim=1) if parts else None


def plain_table(size: int, dim: int) -> nn.Embedding:
    """Embeddings of `size` codes, each worker's own copy."""
    table = nn.Embedding(size, dim, padding_idx=PADDING)
    nn.init.normal_(table.weight, std=_INIT_STD)
    with torch.no_grad():
        table.weight[PADDING].zero_()
    return table
