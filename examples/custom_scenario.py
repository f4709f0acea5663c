"""A domain of your own, written out in a recipe, and a run in it on the echo engine, which needs no model.

    python examples/custom_scenario.py

With your own paths in it, the recipe is a file: `owlrec run wines.yaml`. Then it names a real engine.
"""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from owlrec.cli import run
from owlrec.prompting.framework import item_prompt, item_system
from owlrec.prompting.frameworks import KAR
from owlrec.recipe import load_recipe
from owlrec.releases import open_release
from owlrec.workspace import Workspace

RECIPE = """
name: wines
scenario:
  name: wines
  item: wine
  items: wines
  consumed: tasted
  history: tasting history
  rating_unit: point
  user_factors: [grape, region, body, occasion]
  item_factors: [grape, region, body, the food it goes with]
  positive_above: 3 # more points mean that the user liked it
  text_fields: [grape]
workspace: FOLDER/run
source: {type: table, items: FOLDER/wines.csv, interactions: FOLDER/tastings.csv}
engine: {type: echo}
"""


def main(folder: Path) -> None:
    ids, random = np.arange(40), np.random.default_rng(0)
    wines = pd.DataFrame({"item_id": ids, "title": [f"Wine {i}" for i in ids], "grape": ["Riesling", "Malbec"] * 20})
    wines.to_csv(folder / "wines.csv", index=False)
    tastings = pd.DataFrame({"user_id": np.repeat(np.arange(60), 20)})
    tastings["item_id"] = np.concatenate([random.permutation(ids)[:20] for _ in range(60)])
    tastings["rating"], tastings["timestamp"] = random.integers(1, 6, 1200), 1_700_000_000_000 + np.arange(1200)
    tastings.to_csv(folder / "tastings.csv", index=False)
    recipe = folder / "wines.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder)))
    run(recipe, last="publish")
    domain = load_recipe(recipe).domain
    print(f"\n{item_system(KAR, domain)}\n{item_prompt(KAR, domain, 'Wine 0', {'grape': 'Riesling'})[0]}")
    with open_release(Workspace(folder / "run")) as release:
        print(release.store.get("item", release.store.ids("item", 1)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
