"""OwlRec: open-world LLM recommendation on Ray (see README.md for the tour)."""

__version__ = "0.1.0"
