"""One of the processes that torch.distributed joins: CTR models and the LLM ranker are trained by such."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Worker:
    """Which of how many workers this is, and where it computes."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


ALONE = Worker()
