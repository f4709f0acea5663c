"""Ranking: `serve run serve_apps.rank:app workspace=…`, with the arguments of owlrec.apps.rank."""

from owlrec.apps.rank import app

__all__ = ["app"]
