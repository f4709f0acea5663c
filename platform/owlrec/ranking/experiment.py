"""The recipe's `ranking:` section: which model ranks, what it is shown, how it is tuned and judged.

No torch here: the recipe loads this module at every call.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import Field

from owlrec.config import Config
from owlrec.encoding.projection import PROJECTION
from owlrec.errors import RecipeError
from owlrec.generation import EngineConfig, VllmEngineConfig
from owlrec.prompting.ranking import RankPromptConfig
from owlrec.ranking.samples import Shown, TuningDataConfig


@dataclass(frozen=True)
class TuningSettings:
    """How the adapter is tuned. Rank, alpha, dropout, target modules and learning rate are ReLLa's (sec. 4.4 of its
    code's settings); its batch of 256 would leave few shots with a step an epoch. A recipe sets those of TuningConfig.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    learning_rate: float = 1e-3  # its highest, after the warm-up; it falls to 0 along a line
    warmup_share: float = 0.05  # of all steps
    epochs: int = 3  # at most
    batch_rows: int = 32  # per step, of all workers together
    micro_tokens: int = 2048  # padded tokens that a worker computes at once: it bounds the memory
    max_tokens: int = 2048  # of a prompt: a longer one is refused, since cutting it would cut the question
    max_grad_norm: float = 1.0
    evaluations_per_epoch: int = 1
    patience: int = 2  # evaluations without a better valid AUC before tuning ends
    checkpoint_steps: int = 20
    dtype: str = "bfloat16"  # of the frozen weights; the adapter's are float32
    gradient_checkpointing: bool = False  # computes activations twice instead of keeping them, for large models
    seed: int = 0
    num_workers: int = 1
    use_gpu: bool = False


class TuningConfig(Config):
    """What a recipe says of tuning: see TuningSettings."""

    rank: int = Field(TuningSettings.rank, ge=1)
    learning_rate: float = Field(TuningSettings.learning_rate, gt=0)
    epochs: int = Field(TuningSettings.epochs, ge=1)
    num_workers: int = Field(TuningSettings.num_workers, ge=1)
    use_gpu: bool = TuningSettings.use_gpu

    @property
    def settings(self) -> TuningSettings:
        """With the constants. On GPUs models are large, so their activations are not kept."""
        return TuningSettings(**self.model_dump(), gradient_checkpointing=self.use_gpu)


@dataclass(frozen=True)
class RankerRun:
    """What a run of `owlrec ranker tune` does besides what the recipe says. Valid samples stop the tuning and
    calibrate; like test samples they are drawn as shots are, by their own seed.
    """

    tuning: TuningSettings = field(default_factory=TuningSettings)
    seed: int = 0  # of the shots
    judged: tuple[Shown, ...] = ("recent", "retrieved", "mixed")
    valid_samples: int | None = 400  # at most; None = all
    judging_seed: int = 0
    zero_shot: bool = True  # whether the model as it is is judged too


class JudgingConfig(Config):
    """What a tuned model is judged on."""

    test_samples: int | None = Field(1000, ge=1)  # at most; None = all


# How tuning is spread over machines, or restarted: no reason to tune again.
_MACHINERY = ("num_workers", "use_gpu", "micro_tokens", "gradient_checkpointing", "checkpoint_steps")


class RankingConfig(Config):
    """The LLM ranker."""

    engine: VllmEngineConfig | None = None  # None = the recipe's own engine, which must then be vLLM
    prompt: RankPromptConfig = RankPromptConfig()
    data: TuningDataConfig = TuningDataConfig()
    tuning: TuningConfig = TuningConfig()
    judging: JudgingConfig = JudgingConfig()

    def ranking_engine(self, of_recipe: EngineConfig) -> VllmEngineConfig:
        """The engine that ranks: this section's own, else the recipe's. Raises RecipeError where that is not vLLM."""
        engine = self.engine or of_recipe
        if not isinstance(engine, VllmEngineConfig):
            raise RecipeError(
                f"ranking.engine: the recipe's engine is {engine.type}, but ranking needs vLLM. Set a vLLM engine here."
            )
        return engine

    def decides_adapter(self, run: RankerRun) -> dict[str, Any]:
        """The settings that an adapter depends on: not how it is judged once it is tuned."""
        tuning = {name: value for name, value in asdict(run.tuning).items() if name not in _MACHINERY}
        return {
            "prompt": self.prompt.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "projection": asdict(PROJECTION),
            "tuning": tuning,
            "seed": run.seed,
            "valid": [run.valid_samples, run.judging_seed],
        }
