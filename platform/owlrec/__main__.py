"""`python -m owlrec` is the `owlrec` command: what jobs on a cluster start, wherever its script was installed."""

from owlrec.cli import app

app(prog_name="owlrec")
