"""The recipe's `ranking:` section: the ranking model, its prompts, tuning and evaluation.

No torch here: every recipe loads this module.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import Field

from owlrec.config import Config
from owlrec.encoding.projection import PROJECTION
from owlrec.errors import RecipeError
from owlrec.generation import EngineConfig, VllmEngineConfig
from owlrec.prompting.ranking import RankPromptConfig, RetrievedFor
from owlrec.ranking.samples import Shown, TuningDataConfig


@dataclass(frozen=True)
class TuningSettings:
    """Settings of the adapter's tuning. Rank, alpha, dropout, target modules and learning rate are ReLLa's (sec. 4.4 of
    its code's settings); its batch of 256 would give few shots one step per epoch. A recipe sets those of TuningConfig.
    """

    rank: int = 8  # alpha goes with it
    alpha: int = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    learning_rate: float = 1e-3  # maximum after the warm-up; then falls linearly to 0
    warmup_share: float = 0.05  # of all steps
    epochs: int = 3  # maximum
    batch_rows: int = 32  # per step, of all workers together
    micro_tokens: int = 2048  # padded tokens per worker and pass; bounds the memory
    max_tokens: int = 2048  # per prompt: longer ones are refused, since truncation would cut the question
    max_grad_norm: float = 1.0
    evaluations_per_epoch: int = 1
    patience: int = 2  # evaluations without a better valid AUC before tuning ends
    checkpoint_steps: int = 20
    dtype: str = "bfloat16"  # of the frozen weights; the adapter's are float32
    gradient_checkpointing: bool = False  # recomputes activations instead of keeping them, for large models
    seed: int = 0
    use_gpu: bool = False


class TuningConfig(Config):
    """A recipe's tuning settings: see TuningSettings."""

    learning_rate: float = Field(TuningSettings.learning_rate, gt=0)
    epochs: int = Field(TuningSettings.epochs, ge=1)

    def settings(self, *, use_gpu: bool = False) -> TuningSettings:
        """All settings. On GPUs models are large, so their activations are not kept."""
        return TuningSettings(**self.model_dump(), use_gpu=use_gpu, gradient_checkpointing=use_gpu)


@dataclass(frozen=True)
class RankerRun:
    """Settings of `owlrec ranker tune` outside the recipe. Valid samples are for early stopping and
    calibration; like test samples they are drawn in the same way as shots, with their own seed.
    """

    tuning: TuningSettings = field(default_factory=TuningSettings)
    seed: int = 0  # of the shots
    ways: tuple[Shown, ...] = ("recent", "retrieved", "mixed")
    valid_samples: int | None = 400  # maximum; None = all
    test_samples: int | None = (
        1000  # that the models are judged on, at most; the standard error of an AUC near .75 is then .015
    )
    evaluation_seed: int = 0
    zero_shot: bool = True  # also evaluate the untuned model


# Distribution over machines and restarts do not require tuning again.
_MACHINERY = ("use_gpu", "micro_tokens", "gradient_checkpointing", "checkpoint_steps")


_TOKENS_PER_BEHAVIOR = 34  # twice what a film's title takes: only lists of long titles lose their oldest


class RankingConfig(Config):
    """The LLM ranker."""

    engine: VllmEngineConfig | None = None  # None = the recipe's own engine, which must then be vLLM
    # set: behaviors are retrieved once for all candidates of a request, whose prompts then share all but the
    # candidate's own title, so that a prefix cache serves them; candidate: for each, as in ReLLa.
    retrieved_for: RetrievedFor = "set"
    data: TuningDataConfig = TuningDataConfig()
    tuning: TuningConfig = TuningConfig()

    @property
    def prompt(self) -> RankPromptConfig:
        """How a prompt is written."""
        tokens = self.data.behaviors * _TOKENS_PER_BEHAVIOR
        return RankPromptConfig(retrieved_for=self.retrieved_for, history_tokens=tokens)

    def ranking_engine(self, recipe_engine: EngineConfig) -> VllmEngineConfig:
        """The ranking engine: this section's own, or else the recipe's. Raises RecipeError if that is not vLLM."""
        engine = self.engine or recipe_engine
        if not isinstance(engine, VllmEngineConfig):
            raise RecipeError(
                f"ranking.engine: the recipe's engine is {engine.type}, but ranking needs vLLM. Set a vLLM engine here."
            )
        return engine

    def decides_adapter(self, run: RankerRun) -> dict[str, Any]:
        """Settings that an adapter depends on, without those of its evaluation."""
        tuning = {name: value for name, value in asdict(run.tuning).items() if name not in _MACHINERY}
        return {
            "prompt": self.prompt.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "projection": asdict(PROJECTION),
            "tuning": tuning,
            "seed": run.seed,
            "valid": [run.valid_samples, run.evaluation_seed],
        }
