"""Streaming refresh: finds users with new behaviors and publishes a delta release of their updated texts."""
