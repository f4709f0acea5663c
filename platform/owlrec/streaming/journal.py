"""How a refresh survives being killed at any moment: it writes down what it will do, does it, and moves on last.

    streaming/CURRENT                 where the refreshes stand: watermark, state, release
    streaming/PENDING                 the plan in hand; it exists while its outcome is not in CURRENT
    streaming/plans/<fingerprint16>/  plan.json, prompts/, partitions/, dead.parquet
    streaming/states/<fingerprint16>/ state.json and the files of the shards that this plan touched
    streaming/dead/<fingerprint16>.parquet  the events that this refresh refused (schema.DEAD_LETTERS)

All that a plan decides is in its files before PENDING names it, and everything after that (asking, encoding,
publishing, settling) gives the same result however often it is begun. CURRENT is replaced in one step, after the
release is current: from then on the plan is done, whether or not PENDING still says otherwise. Run one refresh of a
workspace at a time; a second one is told off before it could move CURRENT.
"""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from owlrec.errors import WorkspaceError
from owlrec.streaming.state import MANIFEST, State
from owlrec.workspace import Workspace, shard_file

ROOT = "streaming"
_CURRENT = f"{ROOT}/CURRENT"
_PENDING = f"{ROOT}/PENDING"
_Model = TypeVar("_Model", bound=BaseModel)


class Position(BaseModel):
    """Where the refreshes of a workspace stand."""

    watermark: int | None  # ms: the newest event taken in
    state: str  # the state's folder
    release: str  # in force when the last refresh ended


class Plan(BaseModel):
    """What one refresh will do."""

    fingerprint: str
    base: Position | None  # where it begins; None for the first refresh
    parent: str  # the release that it was planned on
    encoder: str  # whose vectors the parent has
    watermark: int | None
    horizon: int | None  # ms: no later refresh considers an older event
    state: State  # with all new events in their users' short terms
    asked: list[int] = []  # shards with users to ask about; partitions/ has a file for each
    calls: int = 0
    counts: dict[str, int] = {}

    @property
    def folder(self) -> str:
        """Its folder, relative to the workspace."""
        return f"{ROOT}/plans/{self.fingerprint[:16]}"

    @property
    def dead(self) -> str:
        """The file of the events that it refuses (schema.DEAD_LETTERS); absent where there are none."""
        return f"{self.folder}/dead.parquet"

    @property
    def prompts(self) -> str:
        """The folder of its prompts (schema.PROMPTS), in parts."""
        return f"{self.folder}/prompts"

    @property
    def states(self) -> str:
        """The folder of the state that it leads to."""
        return f"{ROOT}/states/{self.fingerprint[:16]}"

    def partition_file(self, shard: int) -> str:
        """The file of the partitions that are frozen in a state's shard."""
        return f"{self.folder}/partitions/{shard_file(shard)}"


def read_position(workspace: Workspace) -> Position | None:
    """Where the refreshes stand, None before the first."""
    return _read(workspace, _CURRENT, Position) if workspace.exists(_CURRENT) else None


def read_state(workspace: Workspace, position: Position) -> State:
    """The state that a position names."""
    return _read(workspace, f"{position.state}/{MANIFEST}", State)


def begin(workspace: Workspace, plan: Plan) -> None:
    """Writes the plan down, whose files are all there: from now on it is carried out."""
    workspace.write_json(f"{plan.folder}/plan.json", plan.model_dump())
    workspace.write_json(_PENDING, {"plan": plan.folder})


def pending_plan(workspace: Workspace) -> Plan | None:
    """The plan that an interrupted refresh left; one that was carried out wholly is cleared away."""
    if not workspace.exists(_PENDING):
        return None
    plan = _read(workspace, f"{workspace.read_json(_PENDING)['plan']}/plan.json", Plan)
    if plan.base == read_position(workspace):
        return plan
    workspace.delete_file(_PENDING)
    return None


def commit(workspace: Workspace, plan: Plan, state: State, release: str) -> Position:
    """Ends a plan: writes its state's manifest, then replaces CURRENT.

    release: in force now. Raises WorkspaceError where another refresh has moved CURRENT meanwhile.
    """
    workspace.write_json(f"{plan.states}/{MANIFEST}", state.model_dump())
    if read_position(workspace) != plan.base:
        raise WorkspaceError(
            f"{workspace.path(_CURRENT)} was moved by another refresh meanwhile, and stays so. Run one refresh of a "
            "workspace at a time; run this one again."
        )
    position = Position(watermark=plan.watermark, state=plan.states, release=release)
    workspace.write_json(_CURRENT, position.model_dump())
    workspace.delete_file(_PENDING)
    return position


def sweep(workspace: Workspace, position: Position) -> None:
    """Removes plans other than the last, and files of earlier states that the present one does not name."""
    state = read_state(workspace, position)
    needed = {shard.file for shard in state.shards.values()} | {state.refused}
    last = position.state.rpartition("/")[2]
    for name in workspace.names(ROOT, "plans"):
        if name != last:
            workspace.delete_dir(ROOT, "plans", name)
    for name in workspace.names(ROOT, "states"):
        files = [f"{ROOT}/states/{name}/{file}" for file in workspace.names(ROOT, "states", name)]
        unneeded = [f for f in files if f not in needed and f != f"{position.state}/{MANIFEST}"]
        if len(unneeded) == len(files):
            workspace.delete_dir(ROOT, "states", name)
            continue
        for file in unneeded:
            workspace.delete_file(file)


def _read(workspace: Workspace, path: str, model: type[_Model]) -> _Model:
    try:
        return model.model_validate(workspace.read_json(path))
    except ValidationError as error:
        raise WorkspaceError(
            f"{workspace.path(path)} is none of this owlrec's ({error.error_count()} mistakes). Delete "
            f"{workspace.path(ROOT)} to begin the refreshes anew: all events are read again, no text is lost."
        ) from None
