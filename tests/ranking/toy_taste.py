"""A toy task for the tiny ranker: whether a user likes a film follows from one word of its title."""

from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.generation.engines import load_tokenizer
from owlrec.prompting.frameworks import NO, YES, RankPromptConfig, rank_prompt
from owlrec.ranking.lora import Examples, tokenize
from owlrec.ranking.samples import TUNING_ROWS
from owlrec.scenario import get_scenario

NOUNS = ("River", "Star", "House", "Song", "Garden", "Train", "Letter", "Winter")


def toy_rows(n: int, seed: int = 0, flipped: bool = False) -> pa.Table:
    """samples.TUNING_ROWS: bright films are liked, dark ones are not; or the other way round."""
    rng = np.random.default_rng(seed)
    movies, rows = get_scenario("movies"), []
    for i in range(n):
        bright = bool(rng.integers(2))
        title = f"{'Bright' if bright else 'Dark'} {rng.choice(NOUNS)}"
        history = [(f"Old {noun}", float(rng.integers(1, 6))) for noun in rng.choice(NOUNS, rng.integers(0, 5))]
        system, text = rank_prompt(movies, {}, title, RankPromptConfig(), len, recent=history)
        row: dict[str, Any] = {"user_id": i % 9, "item_id": i, "timestamp": i, "shown": "recent"}
        rows.append({**row, "system": system, "text": text, "answer": YES if bright != flipped else NO})
    return pa.Table.from_pylist(rows, schema=TUNING_ROWS)


def toy_examples(model: str, n: int, seed: int = 0, flipped: bool = False) -> Examples:
    return tokenize(toy_rows(n, seed, flipped), load_tokenizer(model), max_tokens=512)


def toy_texts() -> list[str]:
    """What a tokenizer should know."""
    return [f"{row['system']} {row['text']}" for row in toy_rows(60, seed=99).to_pylist()]
