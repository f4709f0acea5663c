"""The LLM ranker (ReLLa, WWW 2024): selects behaviors for prompts, builds tuning data, and reads answers."""
