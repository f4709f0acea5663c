"""Texts and vectors to a release: `owlrec run RECIPE --only publish`."""

from pipelines import command

if __name__ == "__main__":
    command("run", "--only", "publish")
