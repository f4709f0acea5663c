"""Forgetting users: removes what a workspace keeps of those whom owlrec.tombstones has silenced."""
