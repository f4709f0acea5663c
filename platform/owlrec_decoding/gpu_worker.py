"""vLLM's GPU worker with the retrieval decoder. `engine_arguments` refers to it."""

from vllm.v1.worker.gpu_worker import Worker

from owlrec_decoding.drafter import RetrievalWorker


class RetrievalGpuWorker(RetrievalWorker, Worker):
    """See RetrievalWorker."""
