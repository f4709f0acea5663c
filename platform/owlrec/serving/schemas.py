"""Schemas of requests and responses, from which FastAPI builds the OpenAPI document.

Strict throughout: an id is an integer, or in lookups a raw id as text, never a float or a boolean, and an unknown key
is an error.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    PlainValidator,
    StrictInt,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from owlrec.ids import EventName

ONE_PATH = "/v1/knowledge/{kind}/{id}"
BATCH_PATH = "/v1/knowledge:batchGet"
BYTES_TYPE = "application/octet-stream"  # raw vectors instead of JSON
ARROW_TYPE = "application/vnd.apache.arrow.stream"  # columns instead of JSON
IF_RELEASE_HEADER = b"if-release"  # answer from this release, or not at all
RELEASE_HEADER = "x-owlrec-release"
DIM_HEADER = "x-owlrec-dim"
REQUEST_ID_HEADER = "x-owlrec-request-id"

Kind = Literal["user", "item", "cohort"]
What = Literal["text", "vector", "codes", "provenance"]
LARGEST_ID = 2**63 - 1
Id = Annotated[StrictInt, Field(ge=0, le=LARGEST_ID)]
ID_PATTERN = r"^[0-9]{1,19}$"
PathId = Annotated[str, Field(pattern=ID_PATTERN, description="a non-negative 64-bit integer")]
LONGEST_RAW_ID = 512
RawId = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=LONGEST_RAW_ID)]
# A raw id is hashed (ids.stable_id). One error for both, which otherwise would name the union's members.
AnyId = Annotated[
    Id | RawId,
    GetPydanticSchema(
        lambda _, handler: core_schema.union_schema(
            [handler(Id), handler(RawId)],
            custom_error_type="id",
            custom_error_message=f"Value error, is neither an integer from 0 to 2^63 - 1 nor a raw id of 1 to "
            f"{LONGEST_RAW_ID} characters",
            mode="left_to_right",
        )
    ),
]

MAX_IDS = 1000
DEFAULT_FIELDS: tuple[What, ...] = ("text", "provenance")


class Request(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FieldError(BaseModel):
    """One error in a request."""

    field: str
    message: str


class ProblemDocument(BaseModel):
    """The body of every error (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldError] = []


class BatchGet(Request):
    """Knowledge about many ids, of one kind (`kind` and `ids`) or of several (`kinds`), all from one release."""

    kind: Kind | None = None
    ids: list[AnyId] | None = Field(None, min_length=1, max_length=MAX_IDS)
    kinds: dict[Kind, Annotated[list[AnyId], Field(min_length=1)]] | None = Field(None, min_length=1)
    fields: list[What] = Field(list(DEFAULT_FIELDS), min_length=1, max_length=4)
    if_release: str | None = Field(None, min_length=1, max_length=100)  # refuse to answer from any other one

    @property
    def by_kind(self) -> Sequence[tuple[Kind, list[int | str]]]:
        """The requested ids of each kind."""
        if self.kinds is not None:
            return list(self.kinds.items())
        assert self.kind is not None
        assert self.ids is not None
        return [(self.kind, self.ids)]

    @field_validator("ids", "fields")
    @classmethod
    def _each_once(cls, values: list[int | str] | None) -> list[int | str] | None:
        if values is not None and len(set(values)) < len(values):
            raise ValueError("has a duplicate; list each value once")
        return values

    @field_validator("kinds")
    @classmethod
    def _few(cls, kinds: dict[Kind, list[int | str]] | None) -> dict[Kind, list[int | str]] | None:
        if kinds is not None and sum(map(len, kinds.values())) > MAX_IDS:
            raise ValueError(f"has more than {MAX_IDS} ids; split the request")
        if kinds is not None and any(len(set(ids)) < len(ids) for ids in kinds.values()):
            raise ValueError("has a duplicate; list each value once")
        return kinds

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        alone = self.kind is not None and self.ids is not None
        if self.kinds is None and not alone:
            raise ValueError("pass `kind` and `ids`, or `kinds`: {kind: ids}")
        if self.kinds is not None and (self.kind is not None or self.ids is not None):
            raise ValueError("pass either `kind` and `ids`, or `kinds`, not both")
        return self


class Similar(Request):
    """Nearest neighbors of an entity, or of a vector, among one kind."""

    kind: Kind
    id: Id | None = None
    vector: list[Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]] | None = Field(
        None, min_length=1, max_length=8192
    )
    limit: StrictInt = Field(10, ge=1, le=100)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.id is None) == (self.vector is None):
            raise ValueError("pass either `id` or `vector`, not both")
        return self


class Provenance(BaseModel):
    """Origin of a text."""

    as_of: int  # ms since 1970, UTC: the text's cutoff
    framework: str
    quality: str
    model: str
    encoder: str
    from_cohorts: bool  # the text comes from the id's cohorts, because it has none of its own


class Entity(BaseModel):
    """Knowledge about one id. `found` is false if there is nothing of what was asked for.

    A field that was not requested is absent; a missing one is null.
    """

    id: int | str  # as in the request
    found: bool
    text: str | None = None
    vector: list[float] | None = None
    codes: list[int] | None = None
    provenance: Provenance | None = None


class SingleAnswer(Entity):
    """Response of GET /v1/knowledge/{kind}/{id}."""

    release: str
    kind: Kind


class BatchAnswer(BaseModel):
    """Response of POST /v1/knowledge:batchGet: `results` are aligned with `ids`, `kinds` with the request's."""

    release: str
    kind: Kind | None = None
    results: list[Entity] = []
    kinds: dict[Kind, list[Entity]] = {}


class Neighbor(BaseModel):
    """One nearby entity."""

    id: int
    score: float  # cosine


class SimilarAnswer(BaseModel):
    """Response of POST /v1/knowledge:similar, nearest first."""

    release: str
    kind: Kind
    results: list[Neighbor]


class ReleaseAnswer(BaseModel):
    """Response of GET /v1/releases/current."""

    release: str
    created: str
    model: str
    encoder: str
    parent: str | None
    delta: bool
    chain: list[str]  # itself and its parents, newest first
    dim: int
    knowledge: dict[str, int]  # ids with their own text, by kind
    as_of_min: int
    as_of_max: int


class Health(BaseModel):
    """Response of /healthz and /readyz."""

    status: str
    release: str | None = None
    problem: str | None = None


Mode = Literal["ctr", "llm", "cascade"]
Score = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
MAX_LLM_CANDIDATES = 100


class HistoryEntry(Request):
    """One behavior of a user."""

    item_id: Id
    rating: Score | None = None
    taken: bool = True  # false for an item that was shown and passed over
    event: EventName | None = None  # for models that read events


FeatureName = Annotated[str, Field(max_length=64)]
_LONGEST_WORD, _MOST_WORDS = 200, 64
_WORD = {"type": "string", "maxLength": _LONGEST_WORD}


def _feature_value(value: Any) -> Any:
    """One validator, so that an error names the field and not each form that it might have had."""
    words = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    if not all(isinstance(word, str) and len(word) <= _LONGEST_WORD for word in words) or len(words) > _MOST_WORDS:
        raise ValueError(f"must be at most {_MOST_WORDS} texts of at most {_LONGEST_WORD} characters")
    if not isinstance(value, list | str | bool | int | float) or value != value:
        raise ValueError("must be a text, a list of texts, a number or a boolean")
    return value


FeatureValue = Annotated[
    str | int | float | bool | list[str],
    PlainValidator(_feature_value),
    WithJsonSchema(
        {"anyOf": [_WORD, {"type": "number"}, {"type": "boolean"},
                   {"type": "array", "items": _WORD, "maxItems": _MOST_WORDS}]}
    ),
]  # fmt: skip


class Rank(Request):
    """Candidates to rank for a user, given by id, by a history, or by both."""

    user_id: Id | None = None
    history: list[HistoryEntry] | None = Field(None, max_length=500)  # latest last; replaces the stored history
    # Features of the user that override stored ones, and features of the interaction, such as device or position.
    profile: dict[FeatureName, FeatureValue] = Field(default_factory=dict, max_length=32)
    context: dict[FeatureName, FeatureValue] = Field(default_factory=dict, max_length=32)
    time: Annotated[StrictInt, Field(ge=0, le=LARGEST_ID)] | None = None  # ms since 1970, UTC, of hour and weekday; now
    candidates: list[Id] = Field(min_length=1, max_length=MAX_IDS)
    mode: Mode = "ctr"
    top_k: StrictInt = Field(10, ge=1, le=MAX_IDS)
    rerank: StrictInt = Field(10, ge=1, le=MAX_LLM_CANDIDATES)  # top CTR candidates for the LLM
    llm_weight: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)  # share in a re-ranked score
    deadline_ms: StrictInt = Field(1000, ge=10, le=30_000)
    explain: bool = False
    labels: bool = False  # whether results have the CTR model's probability of each of its labels

    @field_validator("candidates")
    @classmethod
    def _each_once(cls, values: list[int]) -> list[int]:
        if len(set(values)) < len(values):
            raise ValueError("has a duplicate; list each value once")
        return values

    @model_validator(mode="after")
    def _somebody(self) -> Self:
        if self.user_id is None and self.history is None:
            raise ValueError("pass `user_id`, `history`, or both")
        if self.mode == "llm" and len(self.candidates) > MAX_LLM_CANDIDATES:
            raise ValueError(f"mode llm accepts at most {MAX_LLM_CANDIDATES} candidates; use cascade for more")
        return self


class Explanation(BaseModel):
    """Explanation of a place."""

    ctr_score: float | None = None  # absent if the CTR model could not score it
    ctr_place: int  # counted from 1, among all candidates
    llm_score: float | None = None


class Ranked(BaseModel):
    """One candidate in its place. score: the probability of a click or a Yes, or their weighted mean, absent if
    it was not scored; scores are comparable only within one `by`, unless the LLM's are calibrated.
    """

    id: int
    score: float | None = None
    by: Literal["ctr", "llm"]
    explanation: Explanation | None = None  # if `explain` was set
    labels: dict[str, float] | None = None  # if `labels` was set: `label` is the primary one


class RankAnswer(BaseModel):
    """Response of POST /v1/rank, the best first."""

    mode: Mode
    degraded: bool  # the LLM did not score all its candidates in time; see `reason`
    reason: str | None = None
    results: list[Ranked]
