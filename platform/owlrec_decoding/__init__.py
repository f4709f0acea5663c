"""The speculative retrieval decoder: earlier knowledge drafts, vLLM verifies.

Named here is what a recipe and an engine need; it imports neither torch, numba nor vLLM.
"""

from owlrec.decoding.options import DecodingConfig, DraftLimits, Relaxation, engine_arguments, request_arguments

__all__ = ["DecodingConfig", "DraftLimits", "Relaxation", "engine_arguments", "request_arguments"]
