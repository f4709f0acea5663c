"""Tuning rows as token ids: prompts that end where the answer begins, and the one token that should follow.

The loss sees that token alone. The end of the turn, which every answer shares, would be learnt in a few steps and then
halve what Yes and No weigh.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.errors import RecipeError
from owlrec.generation.chat import render_chat
from owlrec.prompting.rella import YES
from owlrec.ranking.answers import Answers, find_answers, likely_answers


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


def tokenise(
    rows: pa.Table, tokenizer: Any, *, max_tokens: int, template_options: Mapping[str, Any] | None = None
) -> Examples:
    """The rows (samples.TUNING_ROWS) in the model's chat template.

    Raises EngineError where Yes and No cannot be told by their first token, RecipeError where a prompt is longer than
    `max_tokens`.
    """
    answers = likely_answers(tokenizer, find_answers(tokenizer), template_options=template_options)
    prompts = []
    for row in rows.select(["user_id", "item_id", "system", "text"]).to_pylist():
        ids = render_chat(tokenizer, row["system"], row["text"], template_options)
        if len(ids) > max_tokens:
            raise RecipeError(
                f"ranking.tuning.max_tokens: the prompt of user {row['user_id']} and item {row['item_id']} has "
                f"{len(ids)} tokens, but {max_tokens} are allowed. Lower ranking.prompt.history_tokens, which drops "
                "the oldest behaviours, or raise max_tokens."
            )
        prompts.append(np.array(ids, dtype=np.int32))
    labels = np.array([answer == YES for answer in rows["answer"].to_pylist()], dtype=bool)
    return Examples(prompts, labels, answers)
