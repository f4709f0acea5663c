"""The grid of CTR models: `owlrec ctr train RECIPE`."""

from pipelines import command

if __name__ == "__main__":
    command("ctr", "train")
