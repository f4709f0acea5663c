"""What changes under a trained model: the fields that it makes of the knowledge of users and items, and what users did.

An artifact holds weights; vectors, semantic ids and behaviors are read when a request comes, from the current release.
Items recur in requests, and users in sessions, so what the model makes of them is kept as long as it stays the same.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from owlrec.cohorts.collaborative import unit
from owlrec.ctr.adaptor import TrainedTower
from owlrec.ctr.arms import DISLIKED, OLDER_PARTITIONS, Form
from owlrec.ctr.batches import Tables
from owlrec.ctr.model import CTRModel
from owlrec.ctr.model_card import Reads
from owlrec.encoding.projection import Projection

_HELD_BYTES = 1 << 26  # of a kind's fields in a process: half a million ids of 32 numbers
_NO_ID = -1  # ids are not negative


class BehaviorStore(Protocol):
    """Where the behaviors of users come from."""

    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """The last behaviors of users, oldest first: schema.BEHAVIOR [k] each."""


class Store(BehaviorStore, Protocol):
    """What is read of a release (owlrec.releases.KnowledgeStore)."""

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of the newest n partitions of each id: float32 [m, n, d], and bool [m, n]."""

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """The semantic ids, their duplicate digit last."""

    def facets(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The cohorts of each id, and those of users by what they disliked."""


@dataclass(frozen=True)
class SideKnowledge:
    """The knowledge of n users or items, in the form that a model was trained on."""

    vectors: np.ndarray  # float [n, s, d], one a source; d = 0 where only codes are read
    mask: np.ndarray  # bool [n, s]
    codes: np.ndarray  # int64 [n, levels]: see VectorTable.gather_codes


class KnowledgeSource(Protocol):
    """Where a model's knowledge comes from."""

    def gather(self, kind: str, ids: np.ndarray) -> SideKnowledge:
        """That of users or items, aligned with ids: int64 [n]."""


@dataclass(frozen=True)
class StoreKnowledge:
    """The knowledge of a release, brought into the form that training read."""

    store: Store
    reads: Reads
    form: Form
    projection: Projection | None  # that the vectors were reduced by
    levels: int  # of the semantic ids

    def gather(self, kind: str, ids: np.ndarray) -> SideKnowledge:
        """See KnowledgeSource. Only what stands under an id itself, as in training: no cohort stands in for it, except
        as a source of its own.
        """
        n, sources = len(ids), self.reads.sources(kind)
        vectors, mask = np.zeros((n, len(sources), 0), np.float32), np.zeros((n, len(sources)), bool)
        codes = np.zeros((n, self.levels), dtype=np.int64)
        if self.form != "codes":
            vectors, mask = self._vectors(kind, ids, sources)
        if self.form != "vectors":
            for row, own in enumerate(self.store.own_codes(kind, ids)):
                if own:
                    codes[row] = np.array(own[:-1]) + 1
        return SideKnowledge(vectors, mask, codes)

    def _vectors(self, kind: str, ids: np.ndarray, sources: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        slots = {source: number for number, source in enumerate(("knowledge", *OLDER_PARTITIONS))}
        wanted = [slots[source] for source in sources if source in slots]
        gathered: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        own, there = self.store.own_vectors(kind, ids, 1 + max(wanted)) if wanted else (None, None)
        for source in sources:
            if own is not None and there is not None and source in slots:
                gathered.append(own[:, slots[source]])
                masks.append(there[:, slots[source]])
            else:
                vectors, known = self._of_members(kind, ids, facet=int(source == DISLIKED))
                gathered.append(vectors)
                masks.append(known)
        vectors, mask = np.stack(gathered, axis=1), np.stack(masks, axis=1)
        if self.projection is None:
            return vectors, mask
        # Training read them in half precision.
        reduced = self.projection.apply(vectors.reshape(-1, vectors.shape[2])).astype(np.float16).astype(np.float32)
        return reduced.reshape(*mask.shape, -1), mask

    def _of_members(self, kind: str, ids: np.ndarray, facet: int) -> tuple[np.ndarray, np.ndarray]:
        """The means of cohorts' vectors, as `encode` makes them, and who has one. facet: 1 of what users disliked."""
        groups = [facets[facet] for facets in self.store.facets(kind, ids)]
        cohorts, at = np.unique(np.array([c for group in groups for c in group], np.int64), return_inverse=True)
        vectors, known = self.store.own_vectors("cohort", cohorts, 1)
        member = np.repeat(np.arange(len(ids)), [len(group) for group in groups])[known[at, 0]]
        total = np.zeros((len(ids), vectors.shape[2]), dtype=np.float32)
        np.add.at(total, member, vectors[at[known[at, 0]], 0])
        return unit(total).astype(np.float16).astype(np.float32), np.bincount(member, minlength=len(ids)) > 0


@dataclass(frozen=True)
class TableKnowledge:
    """The vectors that a trial was trained on, as a sample of some moment read them."""

    tables: Tables
    before: int | None = None  # ms: only what is strictly earlier; None: the newest

    def gather(self, kind: str, ids: np.ndarray) -> SideKnowledge:
        """See KnowledgeSource."""
        tables = self.tables.users if kind == "user" else self.tables.items
        vectors, mask = np.zeros((len(ids), len(tables), 0), np.float32), np.zeros((len(ids), len(tables)), bool)
        codes = np.zeros((len(ids), 0), dtype=np.int64)
        before = None if self.before is None else np.full(len(ids), self.before)
        if self.tables.form != "codes":
            pairs = [table.gather(ids, before) for table in tables]
            vectors, mask = (np.stack(arrays, axis=1) for arrays in zip(*pairs, strict=True))
        if self.tables.form != "vectors":
            codes = tables[0].gather_codes(ids, before)
        return SideKnowledge(vectors, mask, codes)


class FieldCache:
    """Fields of ids, float32 [width] each, as many as there is room for; the first that came go first. Threads may
    share it.
    """

    def __init__(self, width: int, held_bytes: int = _HELD_BYTES) -> None:
        self._fields = np.empty((max(1, held_bytes // (4 * width)), width), dtype=np.float32)
        self._ids = np.full(len(self._fields), _NO_ID, dtype=np.int64)
        self._rows: dict[int, int] = {}
        self._next = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, ids: np.ndarray, make: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """float32 [n, width]. make: gives the fields of ids that are not held: int64 [k] -> float32 [k, width]."""
        with self._lock:
            rows = np.fromiter((self._rows.get(id_, -1) for id_ in ids.tolist()), np.int64, len(ids))
            fields: np.ndarray = self._fields[rows]
        if len(ids) == 1 and rows[0] < 0:  # a user
            fields = make(ids)
            self._keep(ids, fields)
        if len(ids) == 1 or (rows >= 0).all():
            return fields
        missing, at = np.unique(ids[rows < 0], return_inverse=True)
        made = make(missing)
        fields[rows < 0] = made[at]
        self._keep(missing, made)
        return fields

    def without(self, ids: np.ndarray) -> "FieldCache":
        """A copy that has forgotten some ids."""
        copy = FieldCache(self._fields.shape[1], self._fields.nbytes)
        with self._lock:  # for some milliseconds: requests wait for it
            held = np.array(list(self._rows.values()), dtype=np.int64)
            kept, fields = self._ids[held], self._fields[held]
        same = np.flatnonzero(~np.isin(kept, ids))
        n = len(same)
        copy._ids[:n], copy._fields[:n] = kept[same], fields[same]
        copy._rows = dict(zip(kept[same].tolist(), range(n), strict=True))
        copy._next = n % len(copy._ids)
        return copy

    def _keep(self, ids: np.ndarray, fields: np.ndarray) -> None:
        with self._lock:
            for id_, of_id in zip(ids.tolist()[: len(self._ids)], fields, strict=False):
                if id_ in self._rows:
                    continue
                self._rows.pop(int(self._ids[self._next]), None)
                self._ids[self._next], self._fields[self._next], self._rows[id_] = id_, of_id, self._next
                self._next = (self._next + 1) % len(self._ids)


class LiveState:
    """What a model is given of users and items at this moment. Threads may share it."""

    def __init__(
        self,
        model: CTRModel,
        knowledge: KnowledgeSource | None,
        store: BehaviorStore | None = None,
        held: Mapping[str, FieldCache] | None = None,
    ) -> None:
        """knowledge: None where the model reads none. store: where behaviors come from; None: nobody has any.
        held: by kind, fields that are known to be the same here.
        """
        self.model, self._knowledge, self._store = model, knowledge, store
        width = max(1, model.spec.knowledge_fields // 2 * model.spec.embed_dim)
        self.held = {kind: (held or {}).get(kind) or FieldCache(width) for kind in ("user", "item")}
        adaptor = model.adaptor
        towers = {"user": adaptor.user, "item": adaptor.item} if adaptor else {}
        self._towers = {kind: TrainedTower(tower, adaptor.shared) for kind, tower in towers.items() if adaptor}
        self._nobody = None if knowledge is None else self._made("user", np.array([_NO_ID]))

    def behaviors(self, user_id: int) -> np.ndarray | None:
        """What the user did last, oldest first: schema.BEHAVIOR [k]; None where nothing is known."""
        return self._store.behaviors([user_id])[0] if self._store else None

    def fields(self, kind: str, ids: np.ndarray) -> np.ndarray:
        """What the model makes of the knowledge of users or items: float32 [n, w], an id's fields in a row.

        ids: int64 [n]. Only for a model that reads knowledge.
        """
        return self.held[kind].gather(ids, lambda missing: self._made(kind, missing))

    def adapted(self, user_id: int | None, items: np.ndarray) -> torch.Tensor | None:
        """Batch.adapted of one user's candidates; None where the model reads no knowledge. items: int64 [n]."""
        if self._nobody is None:
            return None
        user = self._nobody if user_id is None else self.fields("user", np.array([user_id]))
        fields = self.fields("item", items)
        both = np.concatenate([np.broadcast_to(user, fields.shape), fields], axis=1)
        return torch.from_numpy(both).unflatten(1, (self.model.spec.knowledge_fields, -1))

    def _made(self, kind: str, ids: np.ndarray) -> np.ndarray:
        assert self._knowledge is not None
        known = self._knowledge.gather(kind, ids)
        with torch.inference_mode():
            forms: list[torch.Tensor] = []
            if self._towers:
                vectors = torch.from_numpy(np.asarray(known.vectors, dtype=np.float32))
                forms.append(self._towers[kind](vectors, torch.from_numpy(known.mask)))
            if self.model.code_fields is not None:
                codes = self.model.code_fields.user if kind == "user" else self.model.code_fields.item
                forms.append(codes(torch.from_numpy(known.codes)))
            made: np.ndarray = torch.cat(forms, dim=1).numpy()
        return made
