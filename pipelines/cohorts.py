"""Cohorts and their prompts: `owlrec run RECIPE --only cohorts`."""

from pipelines import command

if __name__ == "__main__":
    command("run", "--only", "cohorts")
