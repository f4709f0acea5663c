"""Your own domain as a scenario in a recipe, with a run that needs no model: echo engine, hashing encoder.

    python examples/custom_scenario.py

A YAML file can hold the same keys: `owlrec run wines.yaml`. For real texts, configure a real engine.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import owlrec
from owlrec.prompting.frameworks import KAR, item_prompt, item_system
from owlrec.recipe import make_recipe

WINES = {
    "nouns": ["wine", "wines"],
    "consumed": "tasted",
    "history": "tasting history",
    "rating_unit": "point",
    "user_factors": ["grape", "region", "body", "occasion"],
    "item_factors": ["grape", "region", "body", "the food it goes with"],
    "positive_above": 3,  # more points mean that the user liked it
    "text_fields": ["grape"],
}


def main(folder: Path) -> None:
    ids, random = np.arange(40), np.random.default_rng(0)
    wines = pd.DataFrame({"item_id": ids, "title": [f"Wine {i}" for i in ids], "grape": ["Riesling", "Malbec"] * 20})
    wines.to_csv(folder / "wines.csv", index=False)
    tastings = pd.DataFrame({"user_id": np.repeat(np.arange(60), 20)})
    tastings["item_id"] = np.concatenate([random.permutation(ids)[:20] for _ in range(60)])
    tastings["rating"], tastings["timestamp"] = random.integers(1, 6, 1200), 1_700_000_000_000 + np.arange(1200)
    tastings.to_csv(folder / "tastings.csv", index=False)
    source = {"type": "table", "items": folder / "wines.csv", "interactions": folder / "tastings.csv"}
    values: dict[str, Any] = {"name": "wines", "scenario": WINES, "workspace": folder / "run", "source": source}
    recipe = make_recipe({**values, "engine": {"type": "echo"}, "encoder": {"model": "hashing"}})
    owlrec.run(recipe, to="publish")
    print(f"\n{item_system(KAR, recipe.domain)}")
    print(item_prompt(KAR, recipe.domain, "Wine 0", {"grape": "Riesling"})[0])
    with owlrec.open(recipe) as release:
        print(release["item", 0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
