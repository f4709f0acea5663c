"""Tunes the ranker's adapter on Ray Train workers, and scores with it in an engine actor: the only file of this package
that uses Ray.

Checkpoints go to the workspace, not to Ray, so a run resumes after a lost worker (Ray restarts the
group) and after a lost driver (run the same command again) alike.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from owlrec.ctr.training import WorkerSpec, fit_workers, looking_meanwhile, this_worker
from owlrec.errors import EngineError, root_mistake
from owlrec.generation import VllmEngineConfig
from owlrec.generation.models import load_tokenizer, model_identity, resolve_model
from owlrec.process import redirect_output
from owlrec.ranking.experiment import TuningSettings
from owlrec.ranking.tuning import Adapter, open_adapter, save_adapter
from owlrec.workspace import Workspace

_AT_ONCE = 256  # prompts per call of the actor: determines how often progress shows


class TuningSpec(WorkerSpec):
    """A tuning run; each worker reads its rows and the model itself."""

    folder: str  # of the run, in the workspace; contains train.parquet and valid.parquet (samples.TUNING_ROWS)
    model: str
    revision: str | None
    wording: str  # prompting.rella.rank_fingerprint
    settings: TuningSettings

    @property
    def adapter(self) -> str:
        """The adapter's folder."""
        return f"{self.folder}/adapter"

    @property
    def checkpoint(self) -> str:
        """Checkpoint of the run; removed once the adapter exists."""
        return f"{self.folder}/checkpoint.safetensors"


def tune_adapter(workspace: Workspace, spec: TuningSpec, on_steps: Callable[[int], None]) -> Adapter:
    """Adapter of a spec: tuned, resumed from its checkpoint, or already finished.

    Ray must be initialized. Worker output goes to the workspace's log file `tune_ranker`. on_steps: called with
    the number of newly finished steps, from a second thread of this process. Raises any OwlRecError
    of a worker.
    """
    if not workspace.exists(spec.adapter, "ranker.json"):
        with _announcing(workspace, spec, on_steps):
            fit_workers(workspace, _tune, spec, name=f"{spec.folder}/ray/tune")
        workspace.delete_file(spec.checkpoint)
        workspace.delete_file(_progress_file(spec))
    return open_adapter(workspace, spec.adapter, model=model_identity(spec.model, spec.revision), wording=spec.wording)


def score_questions(
    engine: VllmEngineConfig,
    questions: Sequence[tuple[str, str]],
    adapters: Mapping[str, Adapter | None],
    *,
    log_path: str,
    use_gpu: bool = False,
    on_scored: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Probabilities of Yes by adapter name: float64 [n], nan for failed prompts.

    None is the untuned model. One actor has the engine and ends with the call. Ray must be
    initialized. Raises EngineError if it cannot start or dies.
    """
    import ray

    ranks = [adapter.manifest.rank for adapter in adapters.values() if adapter is not None]
    # On a CPU an engine's speed scales with its share of the machine's cores.
    cpus = 1 if use_gpu else engine.threads or os.cpu_count() or 1
    actor = ray.remote(_Scoring).options(num_cpus=cpus, num_gpus=int(use_gpu)).remote(log_path)
    try:
        ray.get(actor.start.remote(engine, max(ranks, default=None)))
        scores = {}
        for name, adapter in adapters.items():
            parts = []
            for start in range(0, len(questions), _AT_ONCE):
                asked = list(questions[start : start + _AT_ONCE])
                parts.append(ray.get(actor.score.remote(asked, adapter.folder if adapter else None)))
                if on_scored:
                    on_scored(len(asked))
            scores[name] = np.concatenate([np.empty(0), *parts])
        return scores
    except ray.exceptions.RayError as error:
        mistake = root_mistake(error) or EngineError(f"the scoring engine has died ({error}). See {log_path}.")
        raise mistake from None
    finally:
        ray.kill(actor)


class _Scoring:
    """The actor. Engine errors are raised by `start`; raised here, Ray would wrap them in a traceback."""

    def __init__(self, log_path: str) -> None:
        redirect_output(log_path)

    def start(self, engine: VllmEngineConfig, lora_rank: int | None) -> None:
        from owlrec.ranking.scorer import Scorer

        self._scorer = Scorer(engine, lora_rank=lora_rank)

    async def score(self, questions: list[tuple[str, str]], adapter: str | None) -> np.ndarray:
        return (await self._scorer.score(questions, adapter)).probabilities


def _tune(loop_config: dict[str, Any]) -> None:
    """Main function of each worker."""
    workspace: Workspace = loop_config["workspace"]
    redirect_output(workspace.log_path("tune_ranker"))
    import pyarrow.compute as pc
    from safetensors.torch import save

    from owlrec.ranking.tuning import Checkpoint, Progress, Schedule, load_model, tokenize, tune

    spec = TuningSpec.model_validate(loop_config["spec"])
    worker = this_worker(spec.threads)
    tokenizer = load_tokenizer(spec.model, spec.revision)
    train, valid = (workspace.read_parquet(f"{spec.folder}/{split}.parquet") for split in ("train", "valid"))
    valid = valid.filter(pc.is_in(valid["shown"], pc.unique(train["shown"])))  # stops on the tuned prompt types
    to_tune, to_stop = (tokenize(rows, tokenizer, max_tokens=spec.settings.max_tokens) for rows in (train, valid))
    model = load_model(resolve_model(spec.model), spec.revision, spec.settings)
    steps = Schedule(len(to_tune), spec.settings).steps
    # All ranks read the same checkpoint: none is written before every rank takes part in a step.
    start = Checkpoint.from_bytes(workspace.read_bytes(spec.checkpoint)) if workspace.exists(spec.checkpoint) else None

    def tell(progress: Progress) -> None:
        about = {"step": progress.step, "steps": steps, "loss": progress.losses[-1], "pid": os.getpid()}
        workspace.write_json(_progress_file(spec), about)

    def keep(checkpoint: Checkpoint) -> None:
        workspace.write_bytes(spec.checkpoint, checkpoint.to_bytes())

    tuned = tune(
        model,
        to_tune,
        to_stop,
        spec.settings,
        worker,
        resume=start,
        on_step=tell,
        keep=keep,
    )
    if worker.rank == 0:
        save_adapter(
            workspace,
            spec.adapter,
            save(tuned.weights, {"format": "pt"}),
            tuned.settings | {"base_model_name_or_path": spec.model, "revision": spec.revision},
            model=model_identity(spec.model, spec.revision),
            wording=spec.wording,
            progress=tuned.progress,
        )


def _progress_file(spec: TuningSpec) -> str:
    return f"{spec.folder}/progress.json"


def _announcing(
    workspace: Workspace, spec: TuningSpec, on_steps: Callable[[int], None]
) -> AbstractContextManager[None]:
    """Calls `on_steps` while the block runs."""
    reported = 0

    def look() -> None:
        nonlocal reported
        done = workspace.read_json(_progress_file(spec))["step"] if workspace.exists(_progress_file(spec)) else 0
        if done > reported:  # after a restart, steps are repeated
            on_steps(done - reported)
            reported = done

    return looking_meanwhile(look)
