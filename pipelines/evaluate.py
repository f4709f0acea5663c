"""Figures and the report: `owlrec run RECIPE --only evaluate`."""

from pipelines import command

if __name__ == "__main__":
    command("run", "--only", "evaluate")
