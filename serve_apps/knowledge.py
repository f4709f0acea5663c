"""Knowledge lookup: `serve run serve_apps.knowledge:app workspace=…`, with the arguments of owlrec.apps.knowledge."""

from owlrec.apps.knowledge import app

__all__ = ["app"]
