"""The LLM ranker (ReLLa, WWW 2024): which behaviours a prompt shows, what to tune on, how to read the answer."""
