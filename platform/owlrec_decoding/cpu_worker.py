"""vLLM's CPU worker with the retrieval decoder, in its own file because the GPU build cannot import it.
`engine_arguments` refers to it."""

from vllm.v1.worker.cpu_worker import CPUWorker

from owlrec_decoding.drafter import RetrievalWorker


class RetrievalCpuWorker(RetrievalWorker, CPUWorker):
    """See RetrievalWorker."""
