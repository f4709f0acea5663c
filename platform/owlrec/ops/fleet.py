"""The machines that a plan is made for, as a YAML file describes them: how many, how fast, at what price, how often
lost.

Every figure is the user's own: nothing here knows any machine, vendor or price.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from owlrec.config import Config
from owlrec.errors import RecipeError, did_you_mean
from owlrec.ops.workload import Call, Estimate, WorkloadFigures


class FleetGroup(Config):
    """Machines of one sort. For engines that run on no GPU, read `gpu` as machine."""

    name: str
    accelerator: str  # free text
    gpus: int = Field(ge=1)
    gpus_per_engine: int = Field(1, ge=1)
    price_per_gpu_hour: float = Field(ge=0)  # in the user's own currency
    on_demand_price_per_gpu_hour: float | None = Field(None, ge=0)  # of spot machines, to tell what they save
    # How fast one engine is, in one of three ways: output tokens/s at full batch (without prefill_tokens_per_s if
    # prompts were included); or [rows in a step, its seconds] of plain decoding, which the decoder's measured speed-up
    # multiplies; or neither, which means as fast as an engine of the measured run.
    tokens_per_s: float | None = Field(None, gt=0)
    curve: list[tuple[float, float]] | None = Field(None, min_length=1)
    prefill_tokens_per_s: float | None = Field(None, gt=0)
    preemption_rate_per_hour: float = Field(0, ge=0)  # of one engine
    provision_s: float = Field(0, ge=0)  # until the cloud gives a machine that was asked for; not paid
    # From a machine to an engine that has loaded its model; paid. None = as measured, for engines as in the measured
    # run; 0 for others.
    startup_s: float | None = Field(None, ge=0)
    idle_timeout_s: float = Field(0, ge=0)  # before the autoscaler gives back a machine without work; paid

    @property
    def engines(self) -> int:
        """How many engines the group runs."""
        return self.gpus // self.gpus_per_engine

    def starts_in(self, workload: WorkloadFigures) -> float:
        """Seconds of `startup_s`, measured where none are given."""
        measured = not (self.tokens_per_s or self.curve)
        return self.startup_s if self.startup_s is not None else (workload.startup_s or 0.0) * measured

    @model_validator(mode="after")
    def _consistent(self) -> "FleetGroup":
        if self.gpus % self.gpus_per_engine:
            raise ValueError(f"{self.gpus} gpus cannot be shared out in engines of {self.gpus_per_engine}; change one")
        if self.curve and (self.tokens_per_s or not self.prefill_tokens_per_s or min(map(min, self.curve)) <= 0):
            raise ValueError(
                "a curve holds rows and seconds above 0, takes the place of tokens_per_s, and needs "
                "prefill_tokens_per_s, since its steps read no prompts"
            )
        if self.prefill_tokens_per_s and not (self.curve or self.tokens_per_s):
            raise ValueError(
                "prefill_tokens_per_s without tokens_per_s or curve; the measured run's speed has prompts in"
            )
        return self


class Assumptions(Config):
    """What to plan with in place of what was measured."""

    prompt_tokens: dict[Call, float] = {}  # a row
    output_tokens: dict[Call, float] = {}
    speed_up: dict[int, float] = {}  # by the decoder: up to so many rows in a step

    def applied(self, workload: WorkloadFigures) -> WorkloadFigures:
        """The figures with these in their place; a row's engine time follows its output."""
        kinds = dict(workload.kinds)
        for call in self.prompt_tokens.keys() | self.output_tokens.keys():
            if call not in kinds:
                raise RecipeError(f"assume: tokens of a {call}, but {workload.measured} were measured. Leave it out.")
            found = kinds[call]
            prompt = self.prompt_tokens.get(call, found.prompt_tokens.expected)
            output = self.output_tokens.get(call, found.output_tokens.expected)
            longer = output / found.output_tokens.expected
            kinds[call] = found.model_copy(
                update={
                    "prompt_tokens": Estimate.of([prompt] * 3),
                    "output_tokens": Estimate.of([output] * 3),
                    "seconds": Estimate.of(found.seconds.array * longer),
                    "knowledge_bytes": Estimate.of(found.knowledge_bytes.array * longer),
                }
            )
        return workload.model_copy(update={"kinds": kinds, "speed_up": self.speed_up or workload.speed_up})


class FleetConfig(Config):
    """The machines to plan for; all groups work on the job together."""

    groups: list[FleetGroup] = Field(min_length=1)
    storage_price_per_gib_month: float = Field(0, ge=0)
    assume: Assumptions = Assumptions()


def load_fleet(path: str | Path) -> FleetConfig:
    """Reads a fleet file. Raises RecipeError, which lists every mistake with its key."""
    try:
        return FleetConfig.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). cluster/fleet-example.yaml shows one.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is no valid YAML ({' '.join(str(error).split())}). Correct it there.") from None
    except ValidationError as error:
        raise RecipeError(f"{path}:\n" + "\n".join(f"  {_explain(detail)}" for detail in error.errors())) from None


def _explain(detail: Any) -> str:
    key, message = ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        names = {1: FleetConfig.model_fields, 2: Assumptions.model_fields}.get(
            len(detail["loc"]), FleetGroup.model_fields
        )
        message = f"unknown key.{did_you_mean(str(detail['loc'][-1]), names)}"
    return f"{key}: {message}" if key else message
