"""vLLM's CPU worker with the retrieval decoder; its own file, since the GPU build cannot import it.
`engine_arguments` names it."""

from vllm.v1.worker.cpu_worker import CPUWorker

from owlrec_decoding.worker import RetrievalWorker


class RetrievalCpuWorker(RetrievalWorker, CPUWorker):
    """See RetrievalWorker."""
