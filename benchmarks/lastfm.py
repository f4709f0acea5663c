"""A music shop without ratings or times: LastFM's plays, DeepSeek's texts imported, from tables to a served ranking.

The folder of --data holds Parquet files of public data that may not be shipped: `artists` and `plays` (HetRec 2011,
LastFM), `colakg` (the split of CoLaKG, SIGIR 2025), `item_texts_deepseek` and `user_texts_deepseek` (CoLaKG's). A play
has no time, so an order stands in for one: of each user, artists of CoLaKG's train split come before a moment and those
of its test split after it, those of neither on either side, drawn by a seed. DeepSeek read the train artists, so its
texts of users are as of that moment. It was given artists' tags: the honest control is the arm `metadata`, which has
them too.

    python -m benchmarks.lastfm --data DIR               # prepare, import, encode, publish, train, report, serve
"""

import argparse
import json
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.serving_processes import free_port, owlrec, process, wait_for_answer
from benchmarks.table import Figure, options_parser, show
from owlrec.ctr.experiment import finished_trials, trials
from owlrec.ops.console import note, table
from owlrec.prompting.prompts import Prompt, PromptConfig, user_prompts
from owlrec.recipe import Recipe, load_recipe
from owlrec.shards import needed_stage
from owlrec.sources.splits import ItemCatalog
from owlrec.workspace import Workspace

READ_UNTIL = 1_300_000_000_000  # ms: where CoLaKG's train split ends
DAY = 86_400_000
BEFORE = 0.8  # of the plays that are in neither split: as many as CoLaKG's own train split has
SHOP = {
    "nouns": ["artist", "artists"],
    "consumed": "listened to",
    "history": "listening history",
    "rating_unit": "",
    "user_factors": ["style", "mood", "era", "country", "listening preference"],
    "item_factors": ["style", "mood", "era", "country", "the listeners they appeal to"],
    "positive_above": 0,
    "text_fields": ["tags"],
}
CANDIDATES, SHOWN = 50, 5


def main() -> None:
    """Runs all of it in --folder, or goes on with what is there."""
    parser = options_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with LastFM's and CoLaKG's files")
    parser.add_argument("--folder", type=Path, default=Path("runs/lastfm"), help="for tables, recipe and workspace")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_tables(options.data, options.folder)
    path = write_recipe(options)
    recipe = load_recipe(path)
    workspace = Workspace(recipe.workspace)
    began = time.monotonic()
    run_stages(path, options.data)
    figures = [Figure(measure="to the report", method="owlrec", value=time.monotonic() - began, unit="s")]
    figures += aucs(recipe, workspace)
    user = show_prompt(recipe, workspace)
    figures.append(rank_served(path, workspace, user))
    show("a music shop", figures, options)


def write_tables(data: Path, folder: Path) -> None:
    """items.parquet and plays.parquet, as a shop would have them; an order stands in for the times."""
    artists = pq.read_table(data / "artists.parquet")
    tags = [", ".join(tags or []) for tags in artists["tags"].to_pylist()]
    items = {"item_id": artists["artist_id"], "title": artists["name"], "tags": tags}
    pq.write_table(pa.table(items), folder / "items.parquet")
    plays, split = pq.read_table(data / "plays.parquet"), pq.read_table(data / "colakg.parquet")
    keys = [split[name].to_pylist() for name in ("user_id", "artist_id", "split")]
    is_early = {(user, artist): name == "train" for user, artist, name in zip(*keys, strict=True)}
    user, artist = plays["user_id"].to_numpy(), plays["artist_id"].to_numpy()
    times = stand_in(user, [is_early.get(key) for key in zip(user.tolist(), artist.tolist(), strict=True)])
    pq.write_table(pa.table({"user_id": user, "item_id": artist, "timestamp": times}), folder / "plays.parquet")


def stand_in(user: np.ndarray, before: list[bool | None], seed: int = 0) -> np.ndarray:
    """int64 [n] ms: of each user's plays, those before READ_UNTIL and those after it, a day apart, in a seeded order.

    user: int64 [n]; before: on which side a play lies, None where either may be.
    """
    random = np.random.default_rng(seed)
    drawn = random.random(len(user)) < BEFORE
    early = np.array([chance if given is None else given for given, chance in zip(before, drawn, strict=True)])
    order = np.lexsort((random.random(len(user)), early, user))  # of each user the late ones first
    keys = 2 * user[order] + early[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    rank = np.arange(len(keys)) - np.repeat(starts, np.diff(np.r_[starts, len(keys)]))
    times = np.empty(len(user), dtype=np.int64)
    times[order] = READ_UNTIL + DAY * np.where(early[order], -rank, rank + 1)
    return times


def write_recipe(options: argparse.Namespace) -> Path:
    """The shop's recipe: nothing in it says how to prepare plays without times, ratings or negatives by hand."""
    folder = options.folder.absolute()
    settings = {
        "name": "lastfm",
        "scenario": SHOP,
        "workspace": str(folder / "ws"),
        "source": {"type": "table", "items": f"{folder}/items.parquet", "interactions": f"{folder}/plays.parquet"},
        "labels": {"rule": "positives_only"},
        "engine": {"type": "echo"},  # asked for nothing: all texts are imported
        "encoder": {"model": "hashing" if options.quick else "minilm"},
        "ctr": {
            "backbones": ["din"],
            "arms": ["none", "metadata", "shuffled", "knowledge"],
            "seeds": [0] if options.quick else [0, 1, 2],
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def run_stages(recipe: Path, data: Path) -> None:
    """The commands that a shop would type. Raises CalledProcessError where one fails."""
    texts = ("--framework", "deepseek", "--kind")
    for command in (
        ("run", recipe, "--to", "prepare"),
        ("knowledge", "import", recipe, data / "item_texts_deepseek.parquet", *texts, "item"),
        ("knowledge", "import", recipe, data / "user_texts_deepseek.parquet", *texts, "user", "--as-of-ms", READ_UNTIL),
        ("run", recipe, "--from", "encode"),
        ("ctr", "export", recipe),
    ):
        subprocess.run([owlrec(), *map(str, command)], check=True)


def aucs(recipe: Recipe, workspace: Workspace) -> list[Figure]:
    """Test AUC of each arm, mean over the seeds."""
    grid = needed_stage(workspace, "train_ctr", "").outputs["grid"]
    arm_aucs: dict[str, list[float]] = {}
    for result in finished_trials(workspace, grid, trials(recipe.ctr)):
        arm_aucs.setdefault(result.trial.arm, []).append(result.test.auc)
    return [
        Figure(
            measure="DIN, test", method=arm, value=round(float(np.mean(values)), 4), unit=f"AUC, {len(values)} seeds"
        )
        for arm, values in arm_aucs.items()
    ]


def show_prompt(recipe: Recipe, workspace: Workspace) -> int:
    """Prints what an LLM would be asked about a user with many plays, and returns the user."""
    users, histories = workspace.read_shard("users", 0), workspace.read_shard("histories", 0)
    catalog = ItemCatalog.load(workspace)
    prompts = user_prompts(users, histories, catalog, PromptConfig(), recipe.domain, lambda text: len(text.split()))
    longest = max((prompt for prompt in prompts if isinstance(prompt, Prompt)), key=lambda prompt: len(prompt.text))
    note(f"user {longest.id}:\n{longest.system}\n{longest.text}")
    return longest.id


def rank_served(recipe: Path, workspace: Workspace, user: int) -> Figure:
    """Serves the exported model, has it rank artists for a user, and prints the first by name."""
    artifact, catalog = needed_stage(workspace, "export_ctr", "").outputs["model"], ItemCatalog.load(workspace)
    body = {"user_id": user, "candidates": catalog.draw(CANDIDATES, 0), "top_k": CANDIDATES}
    port = free_port()
    command = [owlrec(), "serve", str(recipe), "--port", str(port), "--max-replicas", "1"]
    with process([*command, "--artifact", artifact]):
        address = f"http://127.0.0.1:{port}/rank"
        wait_for_answer(f"{address}/readyz")
        headers = {"content-type": "application/json"}
        asked = urllib.request.Request(f"{address}/v1/rank", json.dumps(body).encode(), headers)
        began = time.monotonic()
        with urllib.request.urlopen(asked, timeout=30) as response:
            answer = json.load(response)
        took = 1000 * (time.monotonic() - began)
    ranked = answer["results"]
    titles = catalog.titles(np.array([one["id"] for one in ranked]))
    rows = [(place, title, one["score"]) for place, (title, one) in enumerate(zip(titles, ranked, strict=True), 1)]
    table(f"{CANDIDATES} artists for user {user}, as served", ["place", "artist", "score"], rows[:SHOWN])
    return Figure(measure=f"/v1/rank, {len(ranked)} artists, first request", method="owlrec", value=took, unit="ms")


if __name__ == "__main__":
    main()
