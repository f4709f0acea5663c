"""Raw data to the tables that all later stages read, split in time, with an as_of for every user."""

from owlrec import __version__
from owlrec.errors import SchemaError
from owlrec.ops.console import note
from owlrec.recipe import Recipe
from owlrec.shards import Card
from owlrec.sources.splits import build_samples
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace
from pipelines.stage import Counts, Outputs, execute, main


def run(recipe: Recipe, workspace: Workspace) -> Card:
    """Reads the source, builds samples and histories, writes five tables."""
    raw = recipe.source.load()
    positive_above = recipe.domain.positive_above
    print_ = fingerprint(raw.digest, recipe.split, positive_above, recipe.shard_rows, __version__)

    def body() -> tuple[Counts, Outputs]:
        split = build_samples(raw.interactions, recipe.split, positive_above)
        for part in ("train", "valid", "test"):
            if split.counts[f"positives_{part}"] in (0, split.counts[f"samples_{part}"]):
                raise SchemaError(
                    f"samples: all labels of the {part} split are the same under the rule "
                    f"'rating > {positive_above:g}'. "
                    f"Set positive_above in the recipe to a value that your ratings straddle."
                )
        user_shards = -(-raw.users.num_rows // recipe.shard_rows)
        item_shards = -(-raw.items.num_rows // recipe.shard_rows)
        workspace.write_table("users", raw.users, key="user_id", n_shards=user_shards)
        workspace.write_table("items", raw.items, key="item_id", n_shards=item_shards)
        for name, table in (
            ("interactions", raw.interactions),
            ("histories", split.histories),
            ("samples", split.samples),
        ):
            workspace.write_table(name, table, key="user_id", n_shards=user_shards)
        note(f"{raw.users.num_rows:,} users, {raw.items.num_rows:,} items, {raw.interactions.num_rows:,} interactions")
        note(", ".join(f"{split.counts[f'samples_{s}']:,} {s} samples" for s in ("train", "valid", "test")))
        counts: Counts = {"users": raw.users.num_rows, "items": raw.items.num_rows, **raw.counts, **split.counts}
        return counts, {t: f"tables/{t}" for t in ("users", "items", "interactions", "histories", "samples")}

    return execute(workspace, "prepare", print_, f"{recipe.source.type} to tables", body)


if __name__ == "__main__":
    main(run, __doc__ or "")
