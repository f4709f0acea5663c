"""The explorer: `serve run serve_apps.explorer:app workspace=…`, with the arguments of owlrec.apps.explorer."""

from owlrec.apps.explorer import app

__all__ = ["app"]
