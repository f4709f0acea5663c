"""Prompts to texts: `owlrec run RECIPE --only generate`."""

from pipelines import command

if __name__ == "__main__":
    command("run", "--only", "generate")
