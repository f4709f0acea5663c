"""Which settings a sweep tries: learning rates times sizes of the adaptor, judged on the valid split alone.

No torch and no Ray here: the recipe loads this module at every call. `pipelines.sweep_ctr` runs it.
"""

from itertools import product
from typing import Any

from pydantic import Field

from owlrec.config import Config


class SweepConfig(Config):
    """Values of CTRConfig.learning_rate and of AdaptorConfig's fields; every combination is tried."""

    learning_rates: tuple[float, ...] = Field(default=(1e-3, 2e-3, 4e-3), min_length=1)
    shared_experts: tuple[int, ...] = Field(default=(2,), min_length=1)
    dedicated_experts: tuple[int, ...] = Field(default=(2, 5), min_length=1)
    hidden_dims: tuple[int, ...] = Field(default=(32,), min_length=1)  # of an expert

    def candidates(self, *, adaptor: bool) -> list[dict[str, Any]]:
        """What each candidate changes of CTRConfig. adaptor: False where the arm has none: then only rates differ."""
        if not adaptor:
            return [{"learning_rate": rate} for rate in self.learning_rates]
        sizes = product(self.learning_rates, self.shared_experts, self.dedicated_experts, self.hidden_dims)
        return [
            {
                "learning_rate": rate,
                "adaptor": {"shared_experts": shared, "dedicated_experts": dedicated, "hidden_dim": hidden},
            }
            for rate, shared, dedicated, hidden in sizes
        ]
