"""Streaming refresh: who has moved on since the LLM last read them, and a delta release of their renewed texts."""
