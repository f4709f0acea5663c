"""Forgetting users: removes their data from a workspace after owlrec.workspace has hidden them."""
