from pydantic import Field

from owlrec.config import Config


class AdaptorConfig(Config):
    shared_experts: int = Field(default=2, ge=1)
    dedicated_experts: int = Field(default=5, ge=1)
    hidden_dim: int = Field(default=128, ge=1)
