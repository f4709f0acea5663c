"""Forgetting users: removes what a workspace keeps of those whom owlrec.workspace has silenced."""
