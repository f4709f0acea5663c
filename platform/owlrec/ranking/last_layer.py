"""Item vectors from the ranker's own model: its last layer's states, averaged over an item's text (ReLLa, WWW 2024).

ReLLa hooks the last layer while the model generates with a cache, so that its released code averages a single token.
Here one forward pass reads the text. A lead-in stands before it and is left out of the mean: a causal model parks its
attention on the first token, whose state is huge and says nothing of the text.
"""

from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field

from owlrec.config import Config
from owlrec.errors import EngineError
from owlrec.generation.models import load_tokenizer, model_identity, resolve_model

_LEAD = "An item of a catalogue: "
_BATCH_TOKENS = 2048  # padded; of one forward pass
_VERSION = 1  # of what is read and how it is averaged


class LastLayerConfig(Config):
    """model, revision: as of an engine."""

    model: str
    revision: str | None = None
    max_tokens: int = Field(128, ge=1)  # of a text: a longer one is cut, since title and attributes come first

    @property
    def identity(self) -> str:
        """What the vectors depend on, for fingerprints."""
        return f"last-layer-{_VERSION}@{self.max_tokens}:{model_identity(self.model, self.revision)}"

    def load(self) -> "LastLayerEncoder":
        """The encoder. Raises EngineError as it does."""
        return LastLayerEncoder(self)


class LastLayerEncoder:
    """A loaded model; on a GPU where there is one."""

    def __init__(self, config: LastLayerConfig) -> None:
        """Raises EngineError where the model cannot be loaded."""
        import torch
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._config = config
        self._tokenizer = load_tokenizer(config.model, config.revision)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            folder = resolve_model(config.model)
            model = AutoModel.from_pretrained(folder, revision=config.revision, dtype=torch.bfloat16)
        except (OSError, ValueError, KeyError) as error:
            raise EngineError(
                f"{config.model} cannot be read for item vectors: {error}. Name a causal LM that transformers loads, "
                "or set ranking.item_vectors: encoder."
            ) from None
        self._model = model.to(self._device).eval()

    def encode(self, texts: Sequence[str], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """Vectors aligned with `texts`: float32 [n, hidden size], of length 1; an empty text gets zeros.

        on_batch: called with how many more texts are done.
        """
        lead = self._tokenizer(_LEAD)["input_ids"]
        tokens = [
            self._tokenizer(text, add_special_tokens=False)["input_ids"][: self._config.max_tokens]
            if text.strip()
            else []
            for text in texts
        ]
        vectors = np.zeros((len(texts), self._model.config.get_text_config().hidden_size), dtype=np.float32)
        order = [row for row in sorted(range(len(texts)), key=lambda row: -len(tokens[row])) if tokens[row]]
        while order:
            at_once = max(1, _BATCH_TOKENS // (len(lead) + len(tokens[order[0]])))
            rows, order = order[:at_once], order[at_once:]
            vectors[rows] = self._pooled(lead, [tokens[row] for row in rows])
            if on_batch:
                on_batch(len(rows))
        return vectors

    def _pooled(self, lead: Sequence[int], batch: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [b, hidden size]. Padding stands on the right, where a causal model's own positions never see it."""
        import torch

        ids = torch.zeros(len(batch), len(lead) + len(batch[0]), dtype=torch.int64)
        own = torch.zeros(len(batch), ids.shape[1], 1)
        for row, tokens in enumerate(batch):
            ids[row, : len(lead) + len(tokens)] = torch.tensor([*lead, *tokens])
            own[row, len(lead) : len(lead) + len(tokens)] = 1 / len(tokens)
        with torch.no_grad():
            states = self._model(input_ids=ids.to(self._device), use_cache=False).last_hidden_state.float()
        pooled = (states * own.to(self._device)).sum(dim=1)
        unit: np.ndarray = torch.nn.functional.normalize(pooled).cpu().numpy()
        return unit
