"""Scores one user's candidates from an exported artifact, as the trainer would have scored them.

Nobody is refused: a user or an item that the artifact does not know gets what training left for the unknown (an empty
history, the code of unknown values, the adaptor's default). A user may come by id, with the behaviours that the
artifact holds, or bring newer ones. The user's side is computed once a request, whatever the number of candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from owlrec.ctr.artifact import PROGRAM, SIDES, Adapted
from owlrec.ctr.export import load_trial, read_items, read_vocabularies
from owlrec.ctr.features import ItemFeatures, Vocabularies
from owlrec.ctr.model import Batch, CTRModel
from owlrec.ctr.model_card import read_card
from owlrec.ctr.program import Program, load_program, request_tensors
from owlrec.ctr.user_states import UserShards, UserStates
from owlrec.errors import SchemaError
from owlrec.sources.outcomes import was_taken
from owlrec.workspace import Workspace

_NO_ID = -1  # of someone unknown, where arrays need a number; looked up nowhere


@dataclass(frozen=True)
class User:
    """Who asks. What is None is taken from the artifact, which knows nothing of those without an id."""

    user_id: int | None = None
    history: Sequence[int] | None = None  # item ids, most recent last
    ratings: Sequence[float | None] | None = None  # aligned with history; None: without ratings
    taken: Sequence[bool] | None = None  # aligned with history: False of what was passed over; None: all was taken
    profile: Mapping[str, str] = field(default_factory=dict)  # what it names takes the place of what is known

    @classmethod
    def of_sample(cls, row: Mapping[str, Any]) -> "User":
        """Who a row of schema.SAMPLES is about, at its moment."""
        ratings, labels = row["history_ratings"], row["history_labels"]
        return cls(row["user_id"], row["history"], ratings, list(map(was_taken, ratings, labels)))


class Scorer:
    """An artifact in memory. Threads may share it: it changes nothing after it was opened."""

    def __init__(
        self,
        model: CTRModel,
        items: ItemFeatures,
        vocabularies: Vocabularies,
        users: UserShards,
        adapted: Mapping[str, Adapted],
        program: Program | None = None,
    ) -> None:
        """adapted: of sides "user" and "item" where the model reads knowledge, else empty.

        program: scores in the model's place.
        """
        self.model, self.items, self.vocabularies, self.users = model.eval(), items, vocabularies, users
        self.adapted, self.program = adapted, program
        self._length = model.spec.features.history_length
        self._nobody = self._encode(User(history=()))

    @classmethod
    def open(cls, workspace: Workspace, folder: str, *, program: bool = False) -> "Scorer":
        """A finished artifact. program: by its torch.export program, not by the model that our classes build.

        Raises WorkspaceError where the folder holds none, or where it is damaged.
        """
        read_card(workspace, folder)
        return cls.load(workspace, folder, program=program)

    @classmethod
    def load(cls, workspace: Workspace, folder: str, *, program: bool = False) -> "Scorer":
        """As `open`, of an artifact that may still lack its program and its card."""
        items, _ = read_items(workspace, folder)
        model = load_trial(workspace, folder, items)
        sides = SIDES if model.spec.knowledge_fields else ()
        return cls(
            model,
            items,
            read_vocabularies(workspace, folder),
            UserShards(workspace, f"{folder}/users", model.spec.features.history_length),
            {side: Adapted.open(workspace, folder, side) for side in sides},
            load_program(workspace.read_bytes(f"{folder}/{PROGRAM}")) if program else None,
        )

    def score(self, user: int | User, candidates: Sequence[int] | np.ndarray) -> np.ndarray:
        """float64 [n]: the probability of a click (or of the label that the recipe defines), in the candidates' order.

        user: an id, or a User. candidates: item ids, repeats allowed. Raises SchemaError where a history and its
        ratings differ in length.
        """
        if len(candidates) == 0:
            return np.zeros(0)
        batch = self.batch(user, candidates)
        with torch.inference_mode():
            if self.program is not None:
                scores: Tensor = self.program(request_tensors(batch))
            else:
                scores = self.model(batch).double().sigmoid()
        return scores.numpy()

    def batch(self, user: int | User, candidates: Sequence[int] | np.ndarray) -> Batch:
        """What the model reads for a request: n candidates, the user's part in one row."""
        asking = user if isinstance(user, User) else User(int(user))
        ids, state = np.asarray(candidates, dtype=np.int64), self._state(asking)
        arrays = (self.items.rows(ids), *state.histories.matrices(slice(0, 1)), state.profile)
        items, history, ratings, profile = (torch.from_numpy(array.astype(np.int64)) for array in arrays)
        return Batch(items, history, ratings, profile, adapted=self._adapted(asking.user_id, ids))

    def _state(self, user: User) -> UserStates:
        known = None if user.user_id is None else self.users.find(user.user_id)
        if user.history is None and not user.profile:
            return known or self._nobody
        told = self._encode(user)
        base = known or self._nobody
        if user.history is None:
            told = replace(told, histories=base.histories)
        kept = [name not in user.profile for name in self.vocabularies.profile]
        return replace(told, profile=np.where(kept, base.profile, told.profile))

    def _encode(self, user: User) -> UserStates:
        history = list(user.history or ())
        ratings = [None] * len(history) if user.ratings is None else list(user.ratings)
        took = [True] * len(history) if user.taken is None else list(user.taken)
        if not len(ratings) == len(took) == len(history):
            raise SchemaError(
                f"a user comes with {len(history)} behaviours, {len(ratings)} ratings and {len(took)} outcomes. Give a "
                f"rating or null each, or no ratings at all."
            )
        user_id = pa.array([_NO_ID if user.user_id is None else user.user_id], pa.int64())
        lists = {
            "history": pa.array([history], pa.list_(pa.int64())),
            "history_ratings": pa.array([ratings], pa.list_(pa.float32())),
            "history_labels": pa.array([[float(t) for t in took]], pa.list_(pa.float32())),
        }
        profile = {name: pa.array([user.profile.get(name)], pa.string()) for name in self.vocabularies.profile}
        return UserStates.encode(
            pa.table({"user_id": user_id, **lists}),
            pa.table({"user_id": user_id, **profile}),
            self.items,
            self.vocabularies,
            self._length,
        )

    def _adapted(self, user_id: int | None, ids: np.ndarray) -> Tensor | None:
        if not self.adapted:
            return None
        of = self.adapted["user"]
        user = of.default[None] if user_id is None else of.gather(np.array([user_id]))
        items = self.adapted["item"].gather(ids)
        fields = np.concatenate([np.broadcast_to(user, items.shape), items], axis=1)
        return torch.from_numpy(fields).unflatten(1, (self.model.spec.knowledge_fields, -1))
