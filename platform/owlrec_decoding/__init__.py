"""The speculative retrieval decoder: earlier texts draft, vLLM verifies. A package of its own, without Ray or OwlRec.

Named here is what a program beside vLLM needs; it imports neither torch, numba nor vLLM.
"""

from owlrec_decoding.options import (
    DecodingConfig,
    DecodingError,
    DraftLimits,
    Relaxation,
    VllmError,
    drafting,
    engine_arguments,
    request_arguments,
)

__version__ = "0.1.0"
__all__ = [
    "DecodingConfig",
    "DecodingError",
    "DraftLimits",
    "Relaxation",
    "VllmError",
    "__version__",
    "drafting",
    "engine_arguments",
    "request_arguments",
]
