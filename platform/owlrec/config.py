"""The base of every component's Config: frozen, and strict about keys, since a mistyped option must never be ignored
silently.
"""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen pydantic model that refuses unknown keys; each component subclasses it in its own file."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
