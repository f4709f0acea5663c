"""Entry points of `serve run` and `serve deploy` in a checkout; an installed OwlRec has them as `owlrec.apps`."""
