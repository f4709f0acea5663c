"""Headline numbers, each a script beside its peers: `python -m benchmarks.<name> [--quick] [--json FILE]`."""
