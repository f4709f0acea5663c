"""The LLM's probabilities of Yes: `owlrec ranker score-pairs RECIPE`."""

from pipelines import command

if __name__ == "__main__":
    command("ranker", "score-pairs")
