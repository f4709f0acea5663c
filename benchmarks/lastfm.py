"""LastFM as a music shop: plays counted, no rating, no time, with texts that DeepSeek wrote of the artists.

The whole way that a shop goes: `prepare`, `import` of the texts, `encode`, `publish`, `train-ctr`, `evaluate`,
`export-ctr`, `serve`, and one ranking over HTTP. The data set has no times: plays are put in an order that a seed
draws, so that nothing here says how well a model foretells the future.

    python -m benchmarks.lastfm --data DIR        # DIR/lastfm: artists, plays and item_texts_deepseek as Parquet
"""

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks.arms import arm_figure
from benchmarks.table import Figure, options_parser, show
from owlrec.ctr.experiment import finished_trials, summarise, trials
from owlrec.ops.console import note
from owlrec.prompting.rows import user_prompts
from owlrec.recipe import Recipe, load_recipe
from owlrec.scenario import get_scenario
from owlrec.shards import needed_stage
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace

_FIRST, _HOUR = 1_300_000_000_000, 3_600_000  # ms
_CANDIDATES = 50


def main() -> None:
    """Runs the shop in a temporary folder."""
    parser = options_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lastfm/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_shop(options.data / "lastfm", folder, quick=options.quick)
        start = time.monotonic()
        owlrec("run", str(recipe), "--to", "prepare")
        owlrec("import", str(recipe), str(folder / "texts.parquet"), "--kind", "item", "--framework", "deepseek")
        owlrec("run", str(recipe), "--from", "encode")
        seconds = time.monotonic() - start
        settings = load_recipe(recipe)
        workspace = Workspace(settings.workspace)
        owlrec("export-ctr", str(recipe))
        show_prompt(settings, workspace)
        figures = [Figure(measure="prepare to report", method="all stages", value=round(seconds, 1), unit="s")]
        figures += [Figure(measure="served", method="ranking", value=show_ranking(settings, workspace), unit="items")]
        results = finished_trials(
            workspace, needed_stage(workspace, "train_ctr", "").outputs["grid"], trials(settings.ctr)
        )
        figures += [arm_figure(row) for row in summarise(results)]
    show("LastFM, plays counted", figures, options)


def write_shop(source: Path, folder: Path, *, quick: bool) -> Path:
    """items.parquet, plays.parquet, texts.parquet and recipe.yaml; the recipe's path."""
    artists, plays = pq.read_table(source / "artists.parquet"), pq.read_table(source / "plays.parquet")
    if quick:
        plays = plays.filter(pc.less(plays["user_id"], 300))
    order = np.random.default_rng(0).permutation(len(plays))
    plays = plays.take(pa.array(order))
    log = {
        "user_id": plays["user_id"],
        "item_id": plays["artist_id"],
        "rating": plays["plays"].cast(pa.float32()),
        "timestamp": _FIRST + _HOUR * np.arange(len(plays)),
    }
    pq.write_table(artists.rename_columns(["item_id", "title", "genre"]), folder / "items.parquet")
    pq.write_table(pa.table(log), folder / "plays.parquet")
    pq.write_table(pq.read_table(source / "item_texts_deepseek.parquet"), folder / "texts.parquet")
    scenario = get_scenario("music").model_copy(update={"item": "artist", "items": "artists"})
    recipe = {
        "name": "lastfm",
        "scenario": scenario.model_dump(mode="json"),
        "workspace": str(folder / "workspace"),
        "source": {"type": "table", "items": f"{folder}/items.parquet", "interactions": f"{folder}/plays.parquet"},
        "labels": {"rule": "positives_only", "negatives": 4, "negatives_by": "popularity"},
        "split": {"history_length": 30},
        "engine": {"type": "echo"},  # writes nothing: the texts are imported
        "ctr": {"backbones": ["din"], "arms": ["none", "knowledge", "metadata"], "seeds": [0] if quick else [0, 1, 2]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def owlrec(*arguments: str) -> None:
    """Runs the command; raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-c", "from pipelines.cli import app; app()", *arguments], check=True)


def show_prompt(recipe: Recipe, workspace: Workspace) -> None:
    """Prints what an LLM would be asked about the first user."""
    number = workspace.table_shards("users")[0]
    tables = (workspace.read_shard(name, number) for name in ("users", "histories"))
    catalog = ItemCatalog.load(workspace)
    first = next(user_prompts(*tables, catalog, recipe.prompts, recipe.domain, lambda text: len(text.split())))
    note(getattr(first, "text", str(first)))


def show_ranking(recipe: Recipe, workspace: Workspace) -> int:
    """Asks a server to rank drawn artists for a user and prints the best; how many were ranked."""
    artifact = needed_stage(workspace, "export_ctr", "").outputs["model"]
    users, items = workspace.read_table("users"), workspace.read_table("items")
    titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    candidates = np.random.default_rng(1).choice(np.array(list(titles)), _CANDIDATES, replace=False).tolist()
    asked = {"user_id": users["user_id"][0].as_py(), "candidates": candidates, "top_k": _CANDIDATES}
    with served(workspace, artifact) as web:
        answer = web.post("/v1/rank", json=asked)
        answer.raise_for_status()
    ranked = answer.json()["results"]
    note(json.dumps([[titles[row["id"]], round(row["score"], 3)] for row in ranked[:5]], ensure_ascii=False))
    return len(ranked)


@contextmanager
def served(workspace: Workspace, artifact: str) -> Iterator[httpx.Client]:
    """`owlrec serve` with the artifact, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from pipelines.cli import app; app()"
    options = ["--workspace", workspace.root, "--artifact", artifact, "--port", str(port), "--max-replicas", "1"]
    server = subprocess.Popen([sys.executable, "-c", code, "serve", *options], stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as web:
            end = time.monotonic() + 180
            while True:
                try:
                    if web.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError("the server does not start")
                time.sleep(0.5)
            yield web
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)


if __name__ == "__main__":
    main()
