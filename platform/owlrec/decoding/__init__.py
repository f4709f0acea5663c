"""The speculative retrieval decoder: drafts from earlier knowledge, verified by vLLM.

This module exports the names for recipes and engines; it imports neither torch, numba nor vLLM.
"""

from owlrec.decoding.options import DecodingConfig, DraftLimits, Relaxation, engine_arguments, request_arguments

__all__ = ["DecodingConfig", "DraftLimits", "Relaxation", "engine_arguments", "request_arguments"]
