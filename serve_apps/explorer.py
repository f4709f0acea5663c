"""The explorer: `serve run serve_apps.explorer:app workspace=…`, with the arguments of owlrec.apps.knowledge."""

from owlrec.apps.knowledge import explorer_app as app

__all__ = ["app"]
