"""Doubling the shards: `owlrec reshard RECIPE`."""

from pipelines import command

if __name__ == "__main__":
    command("reshard")
