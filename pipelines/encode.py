"""Texts to vectors: `owlrec run RECIPE --only encode`."""

from pipelines import command

if __name__ == "__main__":
    command("run", "--only", "encode")
