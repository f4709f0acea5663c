"""Cohorts of similar users and items: collaborative vectors, clustering, representatives and their prompts."""
