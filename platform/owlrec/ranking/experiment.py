"""The recipe's `ranking:` section: which model ranks, what it is shown, how it is tuned and judged.

No torch here: the recipe loads this module at every call.
"""

from typing import Any, Literal

from pydantic import Field

from owlrec.config import Config
from owlrec.encoding.encoder import EncoderConfig
from owlrec.encoding.projection import ProjectionConfig
from owlrec.errors import RecipeError
from owlrec.generation import EngineConfig, VllmEngineConfig
from owlrec.prompting.ranking import RankPromptConfig
from owlrec.ranking.retrieval import LastLayerConfig
from owlrec.ranking.samples import Shown, TuningDataConfig


class TuningConfig(Config):
    """How the adapter is tuned. Rank, alpha, dropout, target modules and learning rate are ReLLa's (sec. 4.4 of its
    code's settings); its batch of 256 would leave few shots with a step an epoch.
    """

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1)
    learning_rate: float = Field(1e-3, gt=0)  # its highest, after the warm-up; it falls to 0 along a line
    warmup_share: float = Field(0.05, ge=0, lt=1)  # of all steps
    epochs: int = Field(3, ge=1)  # at most
    batch_rows: int = Field(32, ge=1)  # a step, of all workers together
    micro_tokens: int = Field(2048, ge=1)  # padded tokens that a worker computes at once: it bounds the memory
    max_tokens: int = Field(2048, ge=1)  # of a prompt: a longer one is refused, since cutting it would cut the question
    max_grad_norm: float = Field(1.0, gt=0)
    evaluations_per_epoch: int = Field(1, ge=1)
    patience: int = Field(2, ge=1)  # evaluations without a better valid AUC before tuning ends
    checkpoint_steps: int = Field(20, ge=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the frozen weights; the adapter's are float32
    gradient_checkpointing: bool = False  # computes activations twice instead of keeping them, for large models
    seed: int = Field(0, ge=0)
    num_workers: int = Field(1, ge=1)
    use_gpu: bool = False
    threads: int | None = Field(None, ge=1)  # of each worker; None = the machine's cores, shared among its workers
    max_failures: int = Field(1, ge=0)  # restarts after a lost worker, from the last checkpoint


class JudgingConfig(Config):
    """What tuning is stopped by, calibrated on and judged on. Samples are drawn as shots are, by their own seed."""

    valid_samples: int | None = Field(400, ge=1)  # at most; None = all
    test_samples: int | None = Field(1000, ge=1)
    shown: tuple[Shown, ...] = Field(("recent", "retrieved", "mixed"), min_length=1)
    seed: int = Field(0, ge=0)
    zero_shot: bool = True  # whether the model as it is is judged too


# How tuning is spread over machines, or restarted: no reason to tune again.
_MACHINERY = (
    "threads",
    "num_workers",
    "use_gpu",
    "micro_tokens",
    "gradient_checkpointing",
    "checkpoint_steps",
    "max_failures",
)


class RankingConfig(Config):
    """The LLM ranker."""

    engine: VllmEngineConfig | None = None  # None = the recipe's own engine, which must then be vLLM
    template_options: dict[str, Any] = {}  # of the chat template, such as enable_thinking: false
    prompt: RankPromptConfig = RankPromptConfig()
    data: TuningDataConfig = TuningDataConfig()
    item_vectors: Literal["encoder", "llm"] = "encoder"  # whose vectors retrieve: the recipe's encoder's, or the LLM's
    projection: ProjectionConfig = ProjectionConfig()
    tuning: TuningConfig = TuningConfig()
    judging: JudgingConfig = JudgingConfig()

    def ranking_engine(self, of_recipe: EngineConfig) -> VllmEngineConfig:
        """The engine that ranks: this section's own, else the recipe's. Raises RecipeError where that is not vLLM."""
        engine = self.engine or of_recipe
        if not isinstance(engine, VllmEngineConfig):
            raise RecipeError(f"ranking.engine: the recipe's engine is {engine.type}, but vLLM must rank. Name one.")
        return engine

    def item_encoder(self, of_recipe: EncoderConfig, engine: VllmEngineConfig) -> EncoderConfig | LastLayerConfig:
        """What makes the vectors by which behaviours are retrieved. engine: the one that ranks."""
        if self.item_vectors == "encoder":
            return of_recipe
        return LastLayerConfig(model=engine.model, revision=engine.revision)

    @property
    def decides_adapter(self) -> dict[str, Any]:
        """The settings that an adapter depends on: not how it is judged once it is tuned."""
        settings = self.model_dump(mode="json", exclude={"engine", "judging"})
        settings["tuning"] = {name: value for name, value in settings["tuning"].items() if name not in _MACHINERY}
        return settings | {"valid": [self.judging.valid_samples, self.judging.seed]}
