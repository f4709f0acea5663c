"""The recipe of a run, as a YAML file or a dict: each section is the Config of its component.

This module gathers the stages' Configs, so it imports the stages; none of them imports it. A stage receives only its
own Config.
"""

import io
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from owlrec.cohorts.cohort_model import CohortsConfig
from owlrec.config import Config, Registry
from owlrec.ctr.experiment import CTRConfig, WorkersConfig
from owlrec.ctr.features import FeatureSections
from owlrec.encoding.vectors import EncoderConfig
from owlrec.errors import RecipeError, SourceError, did_you_mean
from owlrec.generation import EngineSection
from owlrec.generation.engines import SamplingConfig
from owlrec.generation.job import GenerateConfig
from owlrec.generation.quality import QualityConfig
from owlrec.prompting.prompts import PromptConfig
from owlrec.ranking.samples import RankingConfig
from owlrec.refresh.events import RefreshConfig
from owlrec.scenario import Scenario, get_scenario
from owlrec.sources import SourceConfig
from owlrec.sources.outcomes import LabelConfig
from owlrec.sources.splits import SplitConfig
from owlrec.sources.tabular import SourceFile, file_format, input_files
from owlrec_decoding import DecodingConfig


class Recipe(Config):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    scenario: Scenario  # the name of a built-in scenario, or your own domain
    workspace: str
    source: SourceConfig
    split: SplitConfig = SplitConfig()
    labels: LabelConfig = LabelConfig()
    features: FeatureSections = {}  # what CTR models read; what is not named follows from the tables
    shard_rows: int = Field(1024, ge=1)  # approximate users or items per shard, the unit of resuming
    cohorts: CohortsConfig | None = None  # None = no cohorts; `cohorts: {}` builds them with the defaults
    prompts: PromptConfig = PromptConfig()
    engine: EngineSection
    sampling: SamplingConfig = SamplingConfig()
    decoding: DecodingConfig = DecodingConfig()
    quality: QualityConfig = QualityConfig()
    generate: GenerateConfig = GenerateConfig()
    encoder: EncoderConfig = EncoderConfig()
    ctr: CTRConfig = CTRConfig()
    training: WorkersConfig = WorkersConfig()
    ranking: RankingConfig | None = None  # None = no LLM ranker; `ranking: {}` tunes one with the defaults
    streaming: RefreshConfig = RefreshConfig()
    # Which Ray cluster a run uses; inside `ray job submit` always the job's own. local: one that ends with the run,
    # with all cores or, as local[4], some; auto or host:port joins one.
    ray: str = Field("local", pattern=r"^(local(\[[1-9]\d*\])?|auto|.+:.+)$")

    @model_validator(mode="before")
    @classmethod
    def _paths_as_text(cls, values: Any) -> Any:
        return _paths_as_text(values)

    @field_validator("scenario", mode="before")
    @classmethod
    def _by_name(cls, scenario: Any) -> Any:
        try:
            return get_scenario(scenario) if isinstance(scenario, str) else scenario
        except RecipeError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _collective_needs_cohorts(self) -> "Recipe":
        if self.prompts.mode != "individual" and self.cohorts is None:
            raise ValueError(f"prompts.mode {self.prompts.mode} needs cohorts: add `cohorts: {{}}` to the recipe")
        return self

    @property
    def domain(self) -> Scenario:
        """The scenario, adjusted to this recipe's label rule: with positives only, a rating is a count."""
        changes: dict[str, Any] = {}
        if self.labels.rating_above is not None:
            changes["positive_above"] = self.labels.rating_above
        if self.labels.rule == "positives_only":
            changes |= {"rating_unit": "time", "positive_above": -1}
        return self.scenario.model_copy(update=changes)


def load_recipe(path: str | Path, *, workspace: str | None = None, max_replicas: int | None = None) -> Recipe:
    """Reads and validates a recipe file.

    workspace, max_replicas: override the recipe's own, if given; of `generate.replicas` that is the most. A
    relative workspace is in the current folder.
    Raises RecipeError, which lists every mistake with its key, and the nearest valid name for an unknown one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). See pipelines/recipes/ for examples.") from None
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not valid YAML ({' '.join(str(error).split())}). Correct it.") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}: must have `key: value` lines at the top level. See pipelines/recipes/ for an example."
        )
    if workspace is not None:
        values["workspace"] = workspace
    if max_replicas is not None:
        generate = values.get("generate")
        generate = generate if isinstance(generate, dict) else {}
        replicas: Any = max_replicas
        match generate.get("replicas"):
            case [int(least), _]:
                replicas = [min(least, max_replicas), max_replicas]
        values["generate"] = {**generate, "replicas": replicas}
    return make_recipe(values, name=str(path))


def make_recipe(values: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
    """A recipe from a dict with the contents of a file; a section may also be its Config and a path a `Path`.

    name: its name in errors. Raises RecipeError like load_recipe.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        lines = _explain(error, values)
        if any("unknown key. Valid names" in line for line in lines):  # not a misspelling
            lines.append(
                "Keys of the first edition no longer work: `owlrec init` writes a recipe with current ones, and"
            )
            lines.append("docs/reference/recipe.md lists them.")
        raise RecipeError(f"{name}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _paths_as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _paths_as_text(entry) for key, entry in value.items()}
    return [_paths_as_text(entry) for entry in value] if isinstance(value, list) else value


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys: YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads a bare off, on, yes or no as a boolean: `mode: off` would be refused as False. As in YAML 1.2, only
# true and false are booleans here; pydantic still converts yes and no for boolean fields.
_BOOL = "tag:yaml.org,2002:bool"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOL, re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF"))
# YAML 1.1 reads 1e-3 as a string, and recipes have many learning rates.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


# What pydantic adds to the place of a mistake in a value that may have several forms: "int", "literal['off']",
# "dict[...]", "constrained-int", "function-after[...]".
_FORM = re.compile(r"int|float|str|bool|tuple|list|dict|Every|constrained-\w+|\w[\w-]*\[.*\]|\[key\]")


def _explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One line per mistake in a recipe with these values."""
    messages: dict[str, list[str]] = {}  # by key: for a value of several forms, what each form takes
    for detail in error.errors():
        location = [part for part in detail["loc"] if not _FORM.fullmatch(str(part))]
        if detail["type"] == "extra_forbidden":
            names = _names_at(location[:-1], values)
            message = f"unknown key.{did_you_mean(str(location[-1]), names)}"
        elif detail["type"] == "missing":
            message = "missing. Add it to the recipe."
        else:
            value = detail.get("input")
            shown = f" (found {value!r})" if not isinstance(value, dict | list) else ""
            message = f"{detail['msg'].removeprefix('Value error, ')}{shown}"
        messages.setdefault(".".join(map(str, location)), []).append(message)
    return [f"{key}: {'; or: '.join(dict.fromkeys(forms))}" for key, forms in messages.items()]


def _names_at(location: Sequence[Any], values: Any) -> list[str]:
    """Valid keys of the section at an error's location, in a recipe with these values."""
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(part)
        if field is None:
            return []
        values = values[part]
        registry = next((m for m in field.metadata if isinstance(m, Registry)), None)
        models = _models_in(field.annotation) if registry is None else [registry.load(values["type"])]
        if len(models) != 1:
            return []
        model = models[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in getattr(annotation, "__args__", ()) for m in _models_in(argument)]


# ----------------------------------------------------------------------------------------------------------------- init
# `owlrec init`: a commented recipe for the tables of a folder, guessed from column names and a sample of rows.
#
# A table is a file, or the files of one folder with the same columns. Nothing here reads a whole file.


class Ask(Protocol):
    """Returns one of the answers to a question. guess: whether the first one is likely enough to take without
    asking."""

    def __call__(self, question: str, answers: Sequence[str], *, guess: bool) -> str: ...


_NAMES = {  # column names, without case and punctuation, most likely first
    "user_id": "userid user uid customerid customer memberid member accountid visitorid readerid buyerid viewerid",
    "item_id": "itemid item sku productid product asin parentasin movieid bookid isbn articleid newsid trackid songid "
    "videoid appid adid contentid artistid",
    "title": "title name itemname productname movietitle booktitle headline",
    "timestamp": "timestamp time ts eventtime datetime date createdat unixtime unixreviewtime",
    "rating": "rating stars score overall",
    "label": "label clicked click target",
    "event": "event eventtype action",
    "weight": "weight",
}
_KNOWN = {role: tuple(names.split()) for role, names in _NAMES.items()}
_NEEDED = {
    "interactions": ("user_id", "item_id", "timestamp"),
    "items": ("item_id", "title"),
    "users": ("user_id",),
}
_OPTIONAL = {"interactions": ("rating", "label", "event", "weight"), "items": (), "users": ()}
_DOMAINS = {
    "movies": "movie film",
    "books": "book isbn novel",
    "music": "song track album artist",
    "apps": "app",
    "ads": "ad advert campaign",
    "news": "news article headline",
}
_OTHER = "other"
_SAMPLE_ROWS, _SAMPLE_BYTES = 1000, 1 << 20


@dataclass(frozen=True)
class Table:
    """A table of a folder: its name in a recipe, and a sample of its rows."""

    path: str
    sample: pa.Table

    @property
    def columns(self) -> list[str]:
        """Names, in the file's order."""
        return list(self.sample.column_names)


def find_tables(folder: Path) -> list[Table]:
    """Tables in a folder and its immediate subfolders, except `runs`, which has workspaces."""
    below = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name != "runs" and p.name[0] not in "._"]
    tables = []
    for place in [folder, *below]:
        groups: dict[tuple[str, ...], list[tuple[Path, pa.Table]]] = {}
        files = [p for p in sorted(place.iterdir()) if p.is_file() and p.name[0] not in "._"]
        for path in files:
            try:
                rows = _sample(input_files(str(path))[0])
            except SourceError:  # neither Parquet nor CSV nor JSON lines
                continue
            groups.setdefault(tuple(rows.column_names), []).append((path, rows))
        for members in groups.values():
            paths = [path for path, _ in members]
            pattern = _pattern(paths)
            if len(paths) > 1 and set(place.glob(pattern)) == set(paths):
                tables.append(Table(str(place / pattern), members[0][1]))
            else:
                tables += [Table(str(path), rows) for path, rows in members]
    return tables


def _pattern(paths: Sequence[Path]) -> str:
    """A glob for files whose names begin and end alike."""
    first, last = min(path.name for path in paths), max(path.name for path in paths)
    alike = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return f"{first[:alike]}*{''.join(paths[0].suffixes)}"


def _sample(file: SourceFile) -> pa.Table:
    """The first rows of a file, with guessed types. Raises SourceError if it cannot be read."""
    format_ = file_format(file)
    try:
        with file.open() as stream:
            if format_ == "parquet":
                parquet = pq.ParquetFile(stream)
                batches = islice(parquet.iter_batches(_SAMPLE_ROWS), 1)
                return pa.Table.from_batches(batches, parquet.schema_arrow)
            start = stream.read(_SAMPLE_BYTES)
        lines = io.BytesIO(start if len(start) < _SAMPLE_BYTES else start[: start.rfind(b"\n") + 1])
        if format_ == "json":
            return pajson.read_json(lines)
        delimiter = "\t" if ".tsv" in file.path else ","
        return pacsv.read_csv(lines, parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True))
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{file.path}: cannot be read as {format_} ({error}).") from None


@dataclass(frozen=True)
class Draft:
    """Contents of a recipe."""

    tables: Mapping[str, Table]  # by interactions, items and, if present, users
    columns: Mapping[str, Mapping[str, str]]  # per table: our name -> the file's, if different
    unit: str  # of timestamps
    domain: str


def draft(tables: Sequence[Table], ask: Ask) -> Draft:
    """Assigns tables and columns to their roles. ask: answers what cannot be guessed.

    Raises RecipeError if there are no items or no interactions among the tables.
    """
    chosen: dict[str, Table] = {}
    roles = [("interactions", _is_log), ("items", _has_title), ("users", _has_users)]
    roles.sort(key=lambda pair: not any(map(pair[1], tables)))  # clear cases first
    for role, fits in roles:
        left = [table for table in tables if table not in chosen.values()]
        likely = [table for table in left if fits(table)]
        if role != "users" and not likely and left:
            likely = left
        if role != "users" and not likely:
            raise RecipeError(
                f"there is no table of {role} (columns {', '.join(_NEEDED[role])}), only "
                f"{', '.join(table.path for table in tables) or 'nothing'}. Pass the folder that has it."
            )
        if likely:
            path = likely[0].path
            if len(likely) > 1 or not fits(likely[0]):
                path = ask(f"Which table has the {role}?", [t.path for t in likely], guess=fits(likely[0]))
            chosen[role] = next(table for table in likely if table.path == path)
    columns = {role: _columns(role, table, ask) for role, table in chosen.items()}
    log = chosen["interactions"]
    unit = _unit(log.sample[columns["interactions"].get("timestamp", "timestamp")])
    return Draft(chosen, columns, unit, _domain(chosen.values(), ask))


def _columns(role: str, table: Table, ask: Ask) -> dict[str, str]:
    columns: dict[str, str] = {}
    for ours in (*_NEEDED[role], *_OPTIONAL[role]):
        free = [name for name in table.columns if name not in columns.values()]
        theirs = _match(ours, free)
        if theirs is None and role != "interactions" and ours != "title":  # the only id of a table of entities
            theirs = next((name for name in free if _plain(name) == "id"), None)
        if theirs is None and ours in _NEEDED[role]:
            if not free:
                raise RecipeError(f"{table.path}: no column is left for {ours}.")
            theirs = ask(f"Which column of {table.path} is the {ours}?", free, guess=False)
        if theirs is not None:
            columns[ours] = theirs
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}


def _is_log(table: Table) -> bool:
    return all(_match(role, table.columns) for role in _NEEDED["interactions"])


def _has_title(table: Table) -> bool:
    return bool(_match("title", table.columns)) and not _match("user_id", table.columns)


def _has_users(table: Table) -> bool:
    if _match("item_id", table.columns):
        return False
    named = re.search(r"user|customer|member|reader|viewer", Path(table.path).name.lower())
    return bool(_match("user_id", table.columns) or (named and "id" in map(_plain, table.columns)))


def _match(role: str, columns: Collection[str]) -> str | None:
    plain = {_plain(name): name for name in columns}
    return next((plain[name] for name in _KNOWN[role] if name in plain), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _unit(column: pa.ChunkedArray) -> str:
    """s, ms, us or ns, by the size of the largest value: today is 1.8e9 s after 1970."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return "ms"  # dates have a unit
    largest = max((abs(value) for value in column.to_pylist() if value is not None), default=0)
    return next((unit for unit, most in (("s", 1e11), ("ms", 1e14), ("us", 1e17)) if largest < most), "ns")


def _domain(tables: Iterable[Table], ask: Ask) -> str:
    words = {
        word
        for table in tables
        for text in (table.path, *table.columns)
        for word in re.findall(r"[a-z]+", text.lower())
    }
    stems = words | {word.removesuffix("s") for word in words} | {word.removesuffix("id") for word in words}
    domains = [domain for domain, nouns in _DOMAINS.items() if stems & set(nouns.split())]
    if len(domains) == 1:
        return domains[0]
    return ask(
        "What is recommended?", [*domains, _OTHER, *(name for name in _DOMAINS if name not in domains)], guess=True
    )


def recipe_text(name: str, made: Draft) -> str:
    """The recipe, as YAML with comments."""
    source = "".join(f"  {role}: {_quoted(made.tables[role].path)}\n" for role in _NEEDED if role in made.tables)
    mapped = {role: columns for role, columns in made.columns.items() if columns}
    if mapped:
        source += "  columns: # our name: the file's\n" + "".join(
            f"    {role}: {{{', '.join(f'{ours}: {_quoted(theirs)}' for ours, theirs in columns.items())}}}\n"
            for role, columns in mapped.items()
        )
    items = made.tables["items"]
    named = set(made.columns["items"].values()) | {"item_id", "title"}
    texts = [column for column in items.columns if column not in named][:5]
    scenario = f"scenario: {made.domain} # movies, books, music, apps, ads or news, or written out\n"
    if made.domain == _OTHER:
        scenario = _WRITTEN_OUT.format(texts=", ".join(map(_quoted, texts)))
    return _TEMPLATE.format(name=name, scenario=scenario, source=source, unit=made.unit)


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else "'" + text.replace("'", "''") + "'"


_WRITTEN_OUT = """scenario: # the words that prompts use: replace them by those of your domain
  nouns: [product, products]
  consumed: bought
  history: purchase history
  rating_unit: star # of a rating; `point of 10` where the highest is not 5
  positive_above: 3 # a higher rating means that the user liked it
  user_factors: [category, brand, price, quality, occasion] # what the LLM infers about users
  item_factors: [category, brand, price, quality, target customers] # what it tells about items
  text_fields: [{texts}] # columns of items that prompts quote
"""
_TEMPLATE = """# Written by `owlrec init`. Run it with `owlrec run FILE`; docs/reference/recipe.md explains every key.
name: {name}
workspace: runs/{name} # a folder, or a URI such as s3://bucket/{name}
{scenario}source:
  type: table
{source}  timestamp_unit: {unit}
# Which interactions count as positive: by default a column label or event, else a rating above the scenario's
# positive_above, else all of them, with drawn negatives.
# labels: {{rule: {{rating_above: 3}}}}
engine: {{type: echo}} # invents texts, to see a whole run in seconds; then a model that reads and writes:
# engine: {{type: vllm, model: Qwen/Qwen3-4B-Instruct-2507}}
# engine: {{type: http, base_url: http://HOST:8000/v1, model: MODEL}}
encoder: {{model: hashing}} # needs no model; then `minilm`, a folder, or a model hub's name
ctr:
  backbones: [din]
  arms: [none, knowledge] # without and with knowledge
"""


def write_recipe(folder: Path, file: Path | None, ask: Ask) -> Path:
    """Writes the recipe for a folder's tables, by default NAME.yaml in the current folder; returns the file.

    Raises RecipeError if the file exists, or the folder lacks tables.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder}: folder not found. Pass the folder with the tables.")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip(".-_") or "recipe"
    file = file or Path(f"{name}.yaml")
    if file.exists():
        raise RecipeError(f"{file} already exists and was not changed. Choose another file with --output.")
    text = recipe_text(
        file.stem if re.fullmatch(r"[A-Za-z0-9][\w.-]*", file.stem, re.ASCII) else name, draft(find_tables(folder), ask)
    )
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        raise RecipeError(f"{file}: cannot be written ({error.strerror}). Choose another file with --output.") from None
    return file


def next_step(folder: Path) -> str:
    """Hint for `owlrec run` without a recipe in this folder."""
    recipes = [p.name for p in sorted(folder.glob("*.y*ml")) if re.search(r"^engine:", p.read_text("utf-8"), re.M)]
    if recipes:
        return f"which recipe? Run `owlrec run {recipes[0]}`" + (
            f", or {', '.join(recipes[1:])}." if recipes[1:] else "."
        )
    if tables := find_tables(folder):
        return (
            f"which recipe? `owlrec init` writes one for the tables in this folder ({len(tables)}); then run it with "
            "`owlrec run RECIPE`."
        )
    return (
        "which recipe? This folder has no recipe and no tables. `owlrec init FOLDER` writes one for the "
        "Parquet, CSV or JSON lines files\nin another folder; those under pipelines/recipes/ run on "
        "MovieLens, which comes with OwlRec."
    )
