"""Scores one user's candidates by an exported artifact, as the trainer would have scored them.

Nobody is refused: a user or an item that nothing is known of gets what training left for the unknown (an empty history,
the code of unknown values, the adaptor's default). An item that came after the export has no code of its own, but ranks
by its text. A user may come by id, with the behaviors that the release holds, or bring newer ones. The user's side is
computed once a request, whatever the number of candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from owlrec.ctr.arms import arm_parts
from owlrec.ctr.artifact import PROGRAM
from owlrec.ctr.export import load_trial, read_items, read_vocabularies
from owlrec.ctr.features import RESERVED, UNKNOWN, ItemFeatures, Vocabularies
from owlrec.ctr.live import FieldCache, LiveState, Store, StoreKnowledge
from owlrec.ctr.model import Batch, CTRModel
from owlrec.ctr.model_card import ModelCard, read_card
from owlrec.ctr.profiles import FOLDER as PROFILES
from owlrec.ctr.profiles import Profiles
from owlrec.ctr.program import Program, load_program, request_tensors
from owlrec.encoding.projection import Projection
from owlrec.errors import SchemaError
from owlrec.schema import BEHAVIOR
from owlrec.sources.outcomes import was_taken
from owlrec.workspace import Workspace


@dataclass(frozen=True)
class User:
    """Who asks. What is None is taken from the live state, which knows nothing of those without an id."""

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

    def behaviors(self) -> np.ndarray:
        """The history that they bring: schema.BEHAVIOR [n], without moments.

        Raises SchemaError where the history and its ratings differ in length.
        """
        history = list(self.history or ())
        ratings = [None] * len(history) if self.ratings is None else list(self.ratings)
        took = [True] * len(history) if self.taken is None else list(self.taken)
        if not len(ratings) == len(took) == len(history):
            raise SchemaError(
                f"a user comes with {len(history)} behaviors, {len(ratings)} ratings and {len(took)} outcomes. Give a "
                f"rating or null each, or no ratings at all."
            )
        behaviors = np.zeros(len(history), dtype=BEHAVIOR)
        behaviors["item"], behaviors["label"] = history, took
        behaviors["rating"] = np.array(ratings, dtype=np.float32)  # None becomes NaN
        return behaviors


class Scorer:
    """An artifact in memory. Threads may share it: it changes nothing after it was opened."""

    def __init__(
        self,
        model: CTRModel,
        items: ItemFeatures,
        vocabularies: Vocabularies,
        profiles: Profiles | None = None,
        program: Program | None = None,
    ) -> None:
        """profiles: None where the model reads none. program: scores in the model's place."""
        self.model, self.items, self.vocabularies = model.eval(), items, vocabularies
        self.profiles, self.program = profiles, program
        self._length = model.spec.features.history_length
        self._codes = [
            {value: code for code, value in enumerate(values.to_pylist(), RESERVED)}
            for values in vocabularies.profile.values()
        ]

    @classmethod
    def open(cls, workspace: Workspace, folder: str, *, program: bool = False) -> "Scorer":
        """An artifact, which may still lack its card. program: by its torch.export program, not by the model that our
        classes build.

        Raises WorkspaceError where the folder holds none, or where it is damaged.
        """
        items, _ = read_items(workspace, folder)
        vocabularies = read_vocabularies(workspace, folder)
        return cls(
            load_trial(workspace, folder, items),
            items,
            vocabularies,
            Profiles(workspace, f"{folder}/{PROFILES}") if vocabularies.profile else None,
            load_program(workspace.read_bytes(f"{folder}/{PROGRAM}")) if program else None,
        )

    def score(self, user: int | User, candidates: Sequence[int] | np.ndarray, live: LiveState) -> np.ndarray:
        """float64 [n]: the probability of a click (or of the label that the recipe defines), in the candidates' order.

        user: an id, or a User. candidates: item ids, repeats allowed. live: of this scorer's model. Raises SchemaError
        where a history and its ratings differ in length.
        """
        if len(candidates) == 0:
            return np.zeros(0)
        batch = self.batch(user, candidates, live)
        with torch.inference_mode():
            if self.program is not None:
                scores: Tensor = self.program(request_tensors(batch))
            else:
                scores = self.model(batch).double().sigmoid()
        return scores.numpy()

    def batch(self, user: int | User, candidates: Sequence[int] | np.ndarray, live: LiveState) -> Batch:
        """What the model reads for a request: n candidates, the user's part in one row."""
        asking = user if isinstance(user, User) else User(int(user))
        ids = np.asarray(candidates, dtype=np.int64)
        arrays = (self.items.rows(ids), *self._history(asking, live), self._profile(asking))
        items, history, ratings, profile = (torch.from_numpy(array.astype(np.int64)) for array in arrays)
        return Batch(items, history, ratings, profile, adapted=live.adapted(asking.user_id, ids))

    def _history(self, user: User, live: LiveState) -> tuple[np.ndarray, np.ndarray]:
        """Items and outcomes as training encodes them, int [1, history_length] each."""
        behaviors: np.ndarray | None
        if user.history is not None:
            behaviors = user.behaviors()
        else:
            behaviors = None if user.user_id is None else live.behaviors(user.user_id)
        items, outcomes = (np.zeros((1, self._length), dtype=np.int64) for _ in range(2))
        if behaviors is not None and len(behaviors):
            last = behaviors[-self._length :]
            items[0, : len(last)] = self.items.rows(last["item"])
            outcomes[0, : len(last)] = self.vocabularies.grades.tokens(last["rating"].astype(float), last["label"])
        return items, outcomes

    def _profile(self, user: User) -> np.ndarray:
        """int [1, profile fields]."""
        known = self.profiles.find(user.user_id) if self.profiles and user.user_id is not None else None
        codes = np.full(len(self._codes), UNKNOWN) if known is None else known
        told = [
            field_codes.get(user.profile[name], UNKNOWN) if name in user.profile else code
            for name, field_codes, code in zip(self.vocabularies.profile, self._codes, codes.tolist(), strict=True)
        ]
        return np.array([told], dtype=np.int64).reshape(1, -1)


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: what scores, and what says which releases it may read."""

    scorer: Scorer
    card: ModelCard
    projection: Projection | None

    @classmethod
    def open(cls, workspace: Workspace, folder: str) -> "Artifact":
        """Raises WorkspaceError where the folder holds no finished artifact, or where it is damaged."""
        card = read_card(workspace, folder)
        reduced = workspace.exists(folder, "projection.json")
        projection = Projection.load(workspace, folder, card.grid) if reduced else None
        return cls(Scorer.open(workspace, folder), card, projection)

    def over(self, store: Store, *, dim: int, held: Mapping[str, FieldCache] | None = None) -> LiveState:
        """What its model reads of a release, which must have passed `Reads.refuse_other`.

        dim: components of the release's vectors. held: by kind, fields that are known to be the same there.
        Raises SchemaError for vectors of another length than the model was trained on.
        """
        model, reads = self.scorer.model, self.card.reads
        if reads is None:
            return LiveState(model, None, store, held)
        form = arm_parts(self.card.trial.arm)[1]
        trained_on = len(self.projection.centre) if self.projection else model.spec.knowledge_dim
        if form != "codes" and dim != trained_on:
            raise SchemaError(
                f"the release's vectors have {dim} components, but the model was trained on {trained_on}. Train and "
                "export again on its vectors."
            )
        levels = len(model.spec.user_codes)
        return LiveState(model, StoreKnowledge(store, reads, form, self.projection, levels), store, held)
