"""The LLM ranker: `owlrec ranker tune RECIPE`."""

from pipelines import command

if __name__ == "__main__":
    command("ranker", "tune")
