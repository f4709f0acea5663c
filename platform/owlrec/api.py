"""The Python API: `run`, `write_texts` and `drafting`; `owlrec.open`, `owlrec.Adaptor` and `owlrec.Client` stand beside
them.

These functions do the work of the commands in the caller's process, with dicts, frames and raw ids instead of files and
options. They share the commands' code: `run` calls the stages of `owlrec run`, `write_texts` builds the tables of
`prepare` and generates on the same runner, and `open` opens a release as a server does.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from numbers import Real
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

import owlrec_decoding
from owlrec.errors import EngineError, RecipeError, SchemaError, WorkspaceError
from owlrec.generation import EngineConfig
from owlrec.generation.job import GenerateStage, build_job, dead_file, iterate_knowledge, table_inputs
from owlrec.ids import KINDS, TABLES, stable_id
from owlrec.lookup import workspace_of
from owlrec.ops.console import ShardWatch, progress, silent
from owlrec.recipe import Recipe, load_recipe, make_recipe
from owlrec.releases.earlier_texts import sample_ids
from owlrec.releases.release import current_release, open_release
from owlrec.runner import pending_shards
from owlrec.runs import STAGES
from owlrec.runs.stages import chosen_stages, run_stages
from owlrec.runs.stages import write_texts as write_shards
from owlrec.scenario import Scenario
from owlrec.schema import INTERACTIONS, missing_column
from owlrec.shards import Card, finish_stage, finished_stage
from owlrec.sources.outcomes import Labels, outcome_columns, with_outcomes
from owlrec.sources.raw import Piece, checked, entities_piece, interactions_piece
from owlrec.sources.splits import Behaviors, Texts, histories
from owlrec.sources.tabular import to_milliseconds
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shards_for, table_file
from owlrec_decoding import DecodingError, VllmError

if TYPE_CHECKING:
    import pandas as pd

RecipeLike = Recipe | Mapping[str, Any] | str | PathLike[str]  # a dict has the contents of a YAML file
Section = Mapping[str, Any] | Any  # a recipe's section: a dict or its Config

_HERE_ROWS = 2_000  # up to here, in this process: faster than starting a Ray cluster
_DRAFTED = 50_000  # texts of a kind that `drafting` takes from a release: 200 MB in the engine
_FRAMES = "frames"  # in the card of `write_texts`' tables


# ------------------------------------------------------------------------------------------------------------------ run


def run(
    recipe: RecipeLike,
    to: str | None = None,
    *,
    first: str | None = None,
    workspace: str | PathLike[str] | None = None,
    quiet: bool = False,
) -> dict[str, Card]:
    """Runs a recipe in this process, like `owlrec run`: all stages, or those from `first` to `to`.

    recipe: the path of a YAML file, a Recipe, or a dict with the same keys; its sections may be Configs and its paths
    `Path`s. workspace: replaces the recipe's. quiet: prints nothing. Finished stages are skipped, as in the
    command. Returns each stage's card in order, with its counts, outputs and seconds.
    Raises RecipeError, which names each wrong key, and OwlRecError if a stage fails.

    >>> import owlrec
    >>> cards = owlrec.run("shop.yaml", to="publish", quiet=True)
    >>> list(cards)
    ['prepare', 'cohorts', 'generate', 'encode', 'publish']
    >>> cards["generate"].counts["item_rows_out"]
    60
    """
    chosen = chosen_stages(first or STAGES[0], to or STAGES[-1])
    with silent(quiet):
        return run_stages(_recipe(recipe, workspace), chosen)


def _recipe(recipe: RecipeLike, workspace: str | PathLike[str] | None = None) -> Recipe:
    place = {} if workspace is None else {"workspace": fspath(workspace)}
    if isinstance(recipe, Recipe):
        return recipe.model_copy(update=place)
    if isinstance(recipe, Mapping):
        return make_recipe({**recipe, **place})
    return load_recipe(fspath(recipe), workspace=place.get("workspace"))


# ------------------------------------------------------------------------------------------------------------ drafting


def drafting(
    texts: Any = None,
    mode: Literal["strict", "relaxed", "off"] = "strict",
    **settings: Any,
) -> dict[str, Any]:
    """Keyword arguments that enable the retrieval decoder in a `vllm.LLM`: `LLM(name, **owlrec.drafting("texts.csv"))`.

    texts: what to draft from: a CSV or JSON lines file, a pandas or Arrow table with a column `text` (and,
    optionally, `pool` and `id`), a sequence of texts, or a workspace or recipe, whose current release has texts (in
    pools named after the kind). Without texts, finished answers serve as drafts for later ones. mode: strict changes no
    answer; relaxed accepts more drafts by DARE's rule (`min_prob`). settings: more keys of a recipe's `decoding`.
    Requests name their pools: `SamplingParams(extra_args=owlrec_decoding.request_arguments(["item"]))`. Raises
    RecipeError for an unknown setting, a missing file or a workspace without a release, and EngineError if vLLM is
    missing or has another version than the decoder supports.

    >>> import owlrec
    >>> arguments = owlrec.drafting(["An owl sees by night."], mode="relaxed", min_prob=0.2)
    >>> arguments["additional_config"]["owlrec_decoding"]["config"]["min_prob"]
    0.2
    >>> sorted(arguments)
    ['additional_config', 'speculative_config', 'worker_cls']
    """
    if isinstance(texts, Workspace) or (
        isinstance(texts, str | PathLike) and (Path(texts).is_dir() or Path(texts).suffix in (".yaml", ".yml"))
    ):
        texts = _released_texts(workspace_of(texts))
    try:
        return owlrec_decoding.drafting(texts, mode, **settings)
    except VllmError as error:
        raise EngineError(str(error)) from None
    except DecodingError as error:
        raise RecipeError(str(error)) from None


def _released_texts(workspace: Workspace) -> list[dict[str, Any]]:
    """Texts of the current release, at most _DRAFTED of each kind."""
    if current_release(workspace) is None:
        raise RecipeError(f"texts: {workspace.root} has no release yet. Run `owlrec run`, or pass a file of texts.")
    rows = []
    with open_release(workspace, verify=False, lazily=True) as release:
        for kind in KINDS:
            known = release.get(kind, sample_ids(workspace, release, kind, _DRAFTED).tolist())
            rows += [{"text": k.text, "id": k.id, "pool": kind} for k in known if k is not None and k.text]
    return rows


# --------------------------------------------------------------------------------------------------------- write_texts


def write_texts(
    frame: "pd.DataFrame",
    *,
    scenario: str | Scenario | Mapping[str, Any],
    llm: str | EngineConfig | Mapping[str, Any],
    kind: Literal["item", "user"] = "item",
    items: "pd.DataFrame | None" = None,
    interactions: "pd.DataFrame | None" = None,
    model: str | None = None,
    prompts: Section = None,
    sampling: Section = None,
    quality: Section = None,
    generate: Section = None,
    ray: str | None = None,
    workspace: str | PathLike[str] | None = None,
    quiet: bool = False,
) -> "pd.DataFrame":
    """Generates a text for each row of a frame: returns `id`, `text`, `quality` and `error` in the same order and
    with the same index.

    frame: for items, `id`, `title` and the scenario's `text_fields`; for users, `id` and profile fields, and also pass
    `items` (id and title) and `interactions` (user_id, item_id, timestamp in ms or as a time, and optionally a rating,
    label or event). scenario: a name such as books, or a custom scenario. llm: a model for vLLM on this machine,
    "echo" (invented words, for trying things out), the http(s) address of an OpenAI-compatible server up to /v1
    (`model` then names its model), or the `engine` section of a recipe. prompts, sampling, quality, generate: sections
    of a recipe. ray: a recipe's `ray`, such as auto.

    quality: "ok", or the names of the quality rules that flagged the text. error: the reason for a missing text
    (missing id, duplicate id, empty prompt, failed request); missing elsewhere. Every row is returned once. Up to 2,000
    rows run in this process, more on Ray. workspace: a folder to keep, so an interrupted call resumes there and
    finished rows are not generated again; by default a temporary folder, which needs Ray on this machine. Raises
    SchemaError for a frame without its required columns, or a bad row of `items` or `interactions`.

    >>> import owlrec
    >>> import pandas as pd
    >>> books = pd.DataFrame({"id": ["B1", "B2"], "title": ["Emma", None], "author": ["Jane Austen", None]})
    >>> texts = owlrec.write_texts(books, scenario="books", llm="echo", quiet=True)
    >>> texts.text[0]  # doctest: +ELLIPSIS
    'echo-...'
    >>> texts.error[1]  # doctest: +ELLIPSIS
    'EmptyPrompt: item B2 has no title...'
    """
    sections = {"prompts": prompts, "sampling": sampling, "quality": quality, "generate": generate, "ray": ray}
    recipe = make_recipe(
        {
            **_UNREAD,
            "scenario": scenario,
            "engine": _engine(llm, model),
            **{name: section for name, section in sections.items() if section is not None},
        },
        name="write_texts",
    )
    rows = _rows(frame, kind, recipe.scenario, name="frame")
    answers: dict[int, _Answer] = {}
    if len(rows.errors) < len(frame):
        with ExitStack() as stack:
            stack.enter_context(silent(quiet))
            place = workspace or stack.enter_context(tempfile.TemporaryDirectory(prefix="owlrec-"))
            store = Workspace(fspath(place))
            _write_tables(store, recipe, kind, rows, items, interactions)
            answers = _generate(store, recipe, kind)
    silence = _Answer(None, error=f"NoBehavior: the interactions have nothing that this {kind} took")
    results = [
        _Answer(None, error=rows.errors[at]) if at in rows.errors else answers.get(stable_id(raw), silence)
        for at, raw in enumerate(rows.raw)
    ]
    columns: dict[str, Any] = {name: [getattr(result, name) for result in results] for name in _ANSWER}
    return rows.ids.assign(**columns)


_ANSWER = ("text", "quality", "error")


@dataclass(frozen=True)
class _Answer:
    text: str | None
    quality: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Rows:
    """Rows of a frame: a table of the valid ones, and errors for the others."""

    ids: "pd.DataFrame"  # one column, unchanged
    raw: list[str]  # the ids as text
    errors: dict[int, str]  # error by row
    table: pa.Table  # valid rows: raw ids under the kind's key, then texts


def _rows(frame: "pd.DataFrame", kind: Literal["item", "user"], scenario: Scenario, *, name: str) -> _Rows:
    """Raises SchemaError if the frame has no id or, for items, no title."""
    key = "id" if "id" in frame.columns else f"{kind}_id"
    fields = ("title", *scenario.text_fields) if kind == "item" else scenario.profile_fields
    for column in (key, *fields[: kind == "item"]):
        if column not in frame.columns:
            held = ", ".join(map(str, frame.columns)) or "no columns"
            raise SchemaError(f"{name}: column '{column}' is missing; the frame has {held}. Rename one.")
    named = frame[key].tolist()
    raw = [_raw_id(value) for value in named]
    errors: dict[int, str] = {}
    seen: set[str] = set()
    for row, id_ in enumerate(raw):
        if not id_:
            errors[row] = f"NoId: {named[row]!r:.60} is neither a text nor an integer"
        elif id_ in seen:
            errors[row] = f"RepeatedId: {id_} is also in an earlier row"
        seen.add(id_)
    columns = {}
    for field in dict.fromkeys(fields):
        if field in frame.columns:
            columns[field] = _cells(frame[field].tolist(), field, errors)
    good = [row for row in range(len(raw)) if row not in errors]
    arrays = {field: _column([cells[row] for row in good]) for field, cells in columns.items()}
    table = pa.table({f"{kind}_id": pa.array([raw[row] for row in good], pa.string()), **arrays})
    return _Rows(frame[[key]].set_axis(["id"], axis=1), raw, errors, table)


def _raw_id(value: Any) -> str:
    """A raw id as sources read it, or "" if invalid. Pandas turns integers into floats if one is missing."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int | np.integer) and not isinstance(value, bool):
        with suppress(UnicodeEncodeError):
            return str(value).encode().decode()
    return ""


def _cells(values: list[Any], field: str, errors: dict[int, str]) -> list[str | list[str]]:
    """A column as texts or lists of texts, "" for missing values; other values add to `errors`."""
    cells: list[str | list[str]] = []
    for row, value in enumerate(values):
        try:
            several = isinstance(value, list | tuple | np.ndarray) and field != "title"
            cells.append([_text(entry) for entry in value] if several else _text(value))
        except (TypeError, UnicodeEncodeError) as error:
            cells.append("")
            errors.setdefault(row, f"{_ROW_ERRORS[type(error)]}: {field} holds {value!r:.60}, not text")
    return cells


_ROW_ERRORS = {TypeError: "WrongType", UnicodeEncodeError: "UndecodableText"}


def _text(value: Any) -> str:
    """Raises TypeError for anything but text or a number, and UnicodeEncodeError for text that UTF-8 cannot encode."""
    import pandas as pd

    if isinstance(value, str):
        value.encode()
        return value
    if value is None or value is pd.NA or value is pd.NaT:
        return ""
    if not isinstance(value, Real):
        raise TypeError
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))  # a float from an integer column with missing values
    return "" if np.isnan(float(value)) else str(value)


def _column(cells: Sequence[str | list[str]]) -> pa.Array:
    """Texts, or lists of texts if any value is a list."""
    if not any(isinstance(cell, list) for cell in cells):
        return pa.array(cells, pa.string())
    lists = [cell if isinstance(cell, list) else [cell] if cell else [] for cell in cells]
    return pa.array(lists, pa.list_(pa.string()))


def _write_tables(
    store: Workspace,
    recipe: Recipe,
    kind: Literal["item", "user"],
    rows: _Rows,
    items: "pd.DataFrame | None",
    interactions: "pd.DataFrame | None",
) -> None:
    """Writes the tables that `prepare` would write, from which prompts are built."""
    earlier = finished_stage(store, "prepare")
    if earlier is not None and _FRAMES not in earlier.counts:
        raise WorkspaceError(f"{store.root} is the workspace of a run, and its tables would be lost. Use another.")
    if kind == "item":
        tables = {"items": entities_piece("items", rows.table, "frame").data}
    elif items is None or interactions is None:
        raise SchemaError("write_texts: texts about users need their behaviors. Pass items and interactions.")
    else:
        known = _rows(items, "item", recipe.scenario, name="items")
        for row, error in sorted(known.errors.items()):
            raise SchemaError(f"items, row {row}: {error}. Correct the row or drop it.")
        tables = _user_tables(recipe, rows.table, known.table, interactions)
    for name, table in tables.items():
        key = "item_id" if name == "items" else "user_id"
        shards = shards_for(table.num_rows, recipe.shard_rows)
        store.write_table(name, table.sort_by(key), key=key, n_shards=shards)
    files = [store.digest(table_file(name, number)) for name in tables for number in store.table_shards(name)]
    finish_stage(store, "prepare", fingerprint(files), counts={_FRAMES: len(tables)})


def _user_tables(recipe: Recipe, users: pa.Table, items: pa.Table, frame: "pd.DataFrame") -> dict[str, pa.Table]:
    names = {"users": "frame", "items": "items", "interactions": "interactions"}
    try:
        raw = pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SchemaError(f"interactions: a column has values of several types ({error}). Convert it.") from None
    if "timestamp" not in raw.column_names:
        raise missing_column(raw, "timestamp", name="interactions")
    times = to_milliseconds(raw["timestamp"], "ms", name="interactions")
    raw = raw.set_column(raw.column_names.index("timestamp"), "timestamp", times)
    labels = Labels.of(recipe.labels, outcome_columns(raw.column_names), recipe.scenario.positive_above)
    behaviors = with_outcomes(interactions_piece(raw, "interactions"), labels, "interactions")
    pieces = [
        entities_piece("users", users, "frame"),
        entities_piece("items", items, "items"),
        Piece("interactions", behaviors.select(INTERACTIONS.names).cast(INTERACTIONS), "interactions"),
    ]

    def raw_ids(piece: Piece, row: int) -> tuple[str, str]:
        return str(raw["user_id"][row]), str(raw["item_id"][row])

    tables = checked(pieces, raw_ids, "", names, drop_orphans=True)
    ordered = Behaviors.ordered(tables.interactions)
    quoted = histories(ordered, Texts.of(ordered, recipe.split))
    return {"users": tables.users, "items": tables.items, "histories": quoted}


def _generate(store: Workspace, recipe: Recipe, kind: Literal["item", "user"]) -> dict[int, _Answer]:
    """Generates texts for the tables' rows, like `owlrec run`; returns the answers by id."""
    job = build_job(recipe.scenario, recipe.prompts, recipe.sampling, recipe.engine, None, recipe.quality)
    inputs = table_inputs(store, (kind,))
    pending, done = pending_shards(store, job.folder, inputs)
    again = [shard for shard in inputs if shard.name in done and done[shard.name].rows_dead]
    rows = {shard.name: job.count_prompts(store, shard) for shard in (*pending, *again)}
    stage, total = GenerateStage(job, recipe.engine), sum(rows.values())
    with progress("writing texts", total) as advance:
        on_card = ShardWatch(advance, store.log_path("shards"), rows)
        cards = write_shards(recipe, store, stage, inputs, rows, on_card, done=done, again=again, here_rows=_HERE_ROWS)
    answers: dict[int, _Answer] = {}
    for table in iterate_knowledge(store, job.folder, (kind,)):
        for row in table.select(["id", "text", "quality"]).to_pylist():
            answers[row["id"]] = _Answer(row["text"], row["quality"])
    raw_ids = dict(zip(*store.read_table(TABLES[kind], [f"{kind}_id", "raw_id"]).to_pydict().values(), strict=True))
    for name in [name for name, card in cards.items() if card.rows_dead]:
        for row in store.read_parquet(f"{job.folder}/{dead_file(name)}").to_pylist():
            message = row["message"].replace(f"{kind} {row['id']}", f"{kind} {raw_ids[row['id']]}")
            answers[row["id"]] = _Answer(None, error=f"{row['error']}: {message}")
    return answers


# Required recipe sections that these functions do not read.
_UNREAD: Mapping[str, Any] = {
    "name": "frames",
    "scenario": "movies",
    "workspace": "",
    "source": {"type": "table", "items": "", "interactions": ""},
    "split": {"cuts": "now"},
    "engine": {"type": "echo"},
}


def _engine(llm: str | EngineConfig | Mapping[str, Any], model: str | None) -> Any:
    """The `engine` section for a recipe."""
    if isinstance(llm, str) and llm.startswith(("http://", "https://")):
        if model is None:
            raise RecipeError(f"llm: {llm} is a server's address. Also pass its model: model='...'.")
        return {"type": "http", "base_url": llm, "model": model}
    if model is not None:
        raise RecipeError("model: only a server's address needs it. Pass the model as llm.")
    if isinstance(llm, str):
        return {"type": "echo"} if llm == "echo" else {"type": "vllm", "model": llm}
    return llm
