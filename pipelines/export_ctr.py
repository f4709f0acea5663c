"""A CTR model as an artifact: `owlrec ctr export RECIPE`."""

from pipelines import command

if __name__ == "__main__":
    command("ctr", "export")
