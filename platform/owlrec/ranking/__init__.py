"""The LLM ranker (ReLLa, WWW 2024): selects behaviours for prompts, builds tuning data, and reads answers."""
