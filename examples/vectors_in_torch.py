"""A trainer outside OwlRec: a release's vectors as Parquet by raw id, beside a log of its own, in a torch model.

    python examples/vectors_in_torch.py

The texts are made up by the `echo` engine, so that the vectors know nothing: what is shown is the way of the data.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from owlrec.evaluation import auc
from owlrec.sources.movielens import MovieLens100KSource

RECIPE = """
name: vectors
scenario: movies
workspace: FOLDER/run
source: {type: movielens-100k, max_users: 120, max_items: 200}
engine: {type: echo}
encoder: {model: hashing}
"""


def owlrec(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "owlrec.cli", *arguments], check=True)


def main(folder: Path) -> None:
    (recipe := folder / "vectors.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    owlrec("run", str(recipe), "--to", "publish")
    owlrec("knowledge", "export-vectors", str(recipe))
    (exported,) = (folder / "run" / "exports").iterdir()
    log = MovieLens100KSource(type="movielens-100k", max_users=120, max_items=200).load().interactions.to_pandas()
    for kind in ("user", "item"):
        vectors = pd.read_parquet(exported / kind).set_index("raw_id")["vector"]
        log[f"{kind}_vector"] = log[f"{kind}_id"].astype(str).map(vectors)  # none without a text
    log = log.dropna().sort_values("timestamp")
    user, item = (torch.tensor(np.stack(log[f"{kind}_vector"]), dtype=torch.float32) for kind in ("user", "item"))
    labels, train = torch.tensor((log["rating"] > 3).to_numpy()).float(), torch.arange(len(log)) < 0.8 * len(log)
    model, loss = nn.Bilinear(user.shape[1], item.shape[1], 1), nn.functional.binary_cross_entropy_with_logits
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        optimiser.zero_grad()
        loss(model(user[train], item[train]).squeeze(1), labels[train]).backward()
        optimiser.step()
    found = auc(labels[~train].numpy(), model(user[~train], item[~train]).detach().squeeze(1).numpy())
    print(f"{len(log):,} rows with vectors of {user.shape[1]} components, AUC of the last fifth {found:.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
