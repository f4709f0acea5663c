"""The explorer's pages: an ASGI application that renders templates over the current release.

Jinja escapes all external text, and a content security policy without scripts protects even if that fails.
A page uses one leased release, so it never mixes two.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from owlrec.errors import root_mistake
from owlrec.releases.release import Release
from owlrec.serving.guard import READ_KEY, AuditLog, Guard, NoTelemetry, Problem, Stopping, Telemetry, never_stopping
from owlrec.serving.keys import KeyRing
from owlrec.serving.knowledge_api import KnowledgeConfig
from owlrec.serving.questions import WorkspaceTables
from owlrec.serving.schemas import ID_PATTERN, LARGEST_ID, MAX_LLM_CANDIDATES, Kind, PathId, Rank, RankAnswer, Similar
from owlrec.serving.served import ServedReleases, following_app, similar_entities

# ----------------------------------------------------------------------------------------------------------------- text
# A knowledge text as paragraphs, with each paragraph's factor separated if the text names it.


# "Genre: ...", "**Mood** - ...", "2. Director/screenwriter: ...": how models introduce a factor.
_FACTOR = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])?\s*\**(?P<factor>[A-Za-z][\w /&'’,-]{1,58}?)\**\s*(?::\**|\s[-–—])\s+")


@dataclass(frozen=True)
class Paragraph:
    """One paragraph. factor: "" if the text names none."""

    factor: str
    text: str


def paragraphs(text: str) -> list[Paragraph]:
    """Paragraphs of a text, as plain strings: the template escapes them."""
    parts = []
    for line in text.splitlines():
        if not line.strip():
            continue
        match = _FACTOR.match(line)
        factor = match["factor"].strip() if match else ""
        parts.append(Paragraph(factor, line[match.end() :].strip() if match else line.strip()))
    return parts


# -------------------------------------------------------------------------------------------------------------- ranking
# Candidates ranked by the CTR model and by the LLM, side by side, with their moves.
#
# One request to the ranking application returns both. If the LLM did not rank, or nothing ranks at all, the
# page says so and shows the rest.


Ranker = Callable[[Rank], Awaitable[RankAnswer]]  # raises if it does not respond
MOST_CHARACTERS = 2500  # in a list of ids
_DRAWN = 20
_DEADLINE_MS = 8000  # people wait longer than services


async def compare_rankings(ranker: Ranker | None, tables: WorkspaceTables, user: int, words: str) -> dict[str, Any]:
    """Template values for the page. words: item ids, or empty for random ones from the catalog.

    Raises Problem (422) for invalid ids or too many of them.
    """
    # In threads, because tables are files.
    candidates = parse_ids(words) or await asyncio.to_thread(tables.draw_candidates, user, _DRAWN)
    view = {"user": user, "listed": words.strip(), "candidates": len(candidates), "ctr": [], "llm": [], "moved": 0}
    if ranker is None:
        return {**view, "problem": "no ranking application is deployed with this page"}
    if not candidates:
        return {**view, "problem": "there are no candidates: enter item ids"}
    asked = Rank(
        user_id=user,
        candidates=candidates,
        mode="llm",
        top_k=len(candidates),
        deadline_ms=_DEADLINE_MS,
        explain=True,
    )
    try:
        answer = await ranker(asked)
    except Exception as error:
        mistake = root_mistake(error)
        return {**view, "problem": str(mistake) if mistake else "the ranking application does not respond"}
    comparison = await asyncio.to_thread(_comparison, answer, tables)
    return {**view, **comparison, "problem": answer.reason}


def parse_ids(words: str) -> list[int]:
    """Ids from a list written by people, separated by commas, blanks or line breaks; without duplicates.

    Raises Problem (422).
    """
    parts = [part for part in re.split(r"[\s,;]+", words) if part]
    if not all(part.isascii() and part.isdigit() and len(part) <= 19 and int(part) <= LARGEST_ID for part in parts):
        raise Problem(422, "is not a list of item ids, such as 50, 100, 181", field="candidates")
    ids = list(dict.fromkeys(map(int, parts)))
    if len(ids) > MAX_LLM_CANDIDATES:
        raise Problem(422, f"has {len(ids)} ids; an LLM ranks at most {MAX_LLM_CANDIDATES}", field="candidates")
    return ids


def _comparison(answer: RankAnswer, tables: WorkspaceTables) -> dict[str, Any]:
    titles = tables.titles([r.id for r in answer.results])
    rows: list[dict[str, Any]] = []
    for place, (result, title) in enumerate(zip(answer.results, titles, strict=True), 1):
        assert result.explanation is not None
        rows.append(
            {
                "id": result.id,
                "title": title or f"item {result.id}",
                "place": place,
                "ctr_place": result.explanation.ctr_place,
                "ctr_score": result.explanation.ctr_score,
                "llm_score": result.explanation.llm_score,
                "rise": result.explanation.ctr_place - place,  # places higher than in the CTR ranking
            }
        )
    by_llm = any(row["llm_score"] is not None for row in rows)
    return {
        "ctr": sorted(rows, key=lambda row: row["ctr_place"]),
        "llm": rows if by_llm else [],
        "moved": sum(row["rise"] != 0 for row in rows) if by_llm else 0,
        "furthest": max(rows, key=lambda row: abs(row["rise"])) if by_llm else None,
    }


# ---------------------------------------------------------------------------------------------------------------- pages


_FOLDER = Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
_HEADERS = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer", "cache-control": "no-store"}
_FOUND = 50  # maximum search results
_NEIGHBORS = 8
_SAMPLED = 2000  # texts sampled for the release's quality


def build_explorer(
    served: ServedReleases,
    tables: WorkspaceTables,
    keys: KeyRing,
    config: KnowledgeConfig,
    telemetry: Telemetry | None = None,
    ranker: Ranker | None = None,
    stopping: Stopping = never_stopping,
    audit: AuditLog | None = None,
) -> FastAPI:
    """Builds the application; its caller closes `served`. ranker: None if nothing ranks."""
    telemetry = telemetry or NoTelemetry()
    app = following_app(
        "OwlRec explorer",
        served,
        refresh_s=config.refresh_s,
        telemetry=telemetry,
        stopping=stopping,
        openapi_url=None,
    )
    views = _Views(tables)

    async def page(request: Request, make: Callable[[Release], tuple[str, dict[str, Any]]]) -> Response:
        def work() -> Response:
            with served.lease() as release:
                template, values = make(release)
                root = request.scope.get("root_path", "").rstrip("/")
                html = views.render(template, root=root, release=release.manifest, **values)
                return Response(html, 200, _HEADERS, "text/html; charset=utf-8")

        return await asyncio.to_thread(work)

    @app.get("/")
    async def home(request: Request) -> Response:
        return await page(request, lambda release: ("home.html.j2", views.health(release)))

    @app.get("/search")
    async def search(request: Request, q: Annotated[str, Query(max_length=200)] = "", kind: Kind = "user") -> Response:
        return await page(request, lambda release: ("search.html.j2", views.search(release, kind, q.strip())))

    @app.get("/rank")
    async def rank(
        request: Request,
        user: Annotated[str, Query(pattern=ID_PATTERN)],
        candidates: Annotated[str, Query(max_length=MOST_CHARACTERS)] = "",
    ) -> Response:
        request.scope[READ_KEY] = [("user", [_id_of(user, "user")])]
        view = await compare_rankings(ranker, tables, _id_of(user, "user"), candidates)
        return await page(request, lambda release: ("rank.html.j2", view))

    @app.get("/style.css")
    async def style() -> Response:
        return Response((_FOLDER / "style.css").read_text(), 200, {"cache-control": "max-age=600"}, "text/css")

    @app.get("/{kind}/{id}")
    async def entity(request: Request, kind: Kind, id: PathId) -> Response:
        number = _id_of(id, "id")
        request.scope[READ_KEY] = [(kind, [number])]
        return await page(request, lambda release: ("entity.html.j2", views.entity(release, kind, number)))

    app.add_middleware(
        Guard, keys=keys, limits=config.limits, scope="explore", telemetry=telemetry, browser=True, audit=audit
    )
    return app


def _id_of(text: str, field: str) -> int:
    if int(text) > LARGEST_ID:
        raise Problem(422, "is not a 64-bit integer", field=field)
    return int(text)


class _Views:
    """Values for the templates."""

    def __init__(self, tables: WorkspaceTables) -> None:
        self._tables = tables
        self._quality: dict[str, list[dict[str, Any]]] = {}  # by release
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
        )
        self._environment.filters["date"] = _date

    def render(self, template: str, **values: Any) -> str:
        return self._environment.get_template(template).render(**values)

    def health(self, release: Release) -> dict[str, Any]:
        """Coverage, age and quality of the release."""
        if release.name not in self._quality:
            self._quality = {release.name: [self._quality_of(release, kind) for kind in ("user", "item", "cohort")]}
        age = time.time() - datetime.fromisoformat(release.manifest.created).timestamp()
        return {"kinds": self._quality[release.name], "age_hours": age / 3600, "chain": release.chain}

    def search(self, release: Release, kind: Kind, words: str) -> dict[str, Any]:
        """Entities by id, and items by title."""
        matches: dict[int, str] = {}
        if words.isascii() and words.isdigit() and len(words) <= 19 and int(words) <= LARGEST_ID:
            id_ = int(words)
            known = release.store.get(kind, [id_])[0] is not None
            if known or (kind != "cohort" and self._tables.row(kind, id_)):
                matches[id_] = self._name(kind, id_)
        if kind == "item" and words:
            matches |= dict(self._tables.find_items(words, _FOUND))
        return {"kind": kind, "words": words, "found": list(matches.items())[:_FOUND]}

    def entity(self, release: Release, kind: Kind, id_: int) -> dict[str, Any]:
        """One entity. Raises Problem (404) if neither the release nor the tables have it."""
        store = release.store
        known = store.get(kind, [id_])[0]
        row = self._tables.row(kind, id_) if kind != "cohort" else None
        if known is None and row is None:
            raise Problem(404, f"there is no text about {kind} {id_}")
        codes = store.own_codes(kind, [id_])[0]
        cohorts = store.cohorts(kind, [id_])[0]
        return {
            "kind": kind,
            "id": id_,
            "name": self._name(kind, id_),
            "profile": {
                k: _plain(v) for k, v in (row or {}).items() if k not in (f"{kind}_id", "raw_id", "title") and v
            },
            "knowledge": known,
            "borrowed": known is not None and kind != "cohort" and known.framework == "collective",
            "paragraphs": paragraphs(known.text) if known else [],
            "codes": "-".join(map(str, codes)) if codes else "",
            "cohorts": [(c, k.text if k else "") for c, k in zip(cohorts, store.get("cohort", cohorts), strict=True)],
            "history": self._tables.history(id_) if kind == "user" else [],
            "neighbors": self._neighbors(release, kind, id_),
        }

    def _neighbors(self, release: Release, kind: Kind, id_: int) -> list[tuple[int, str, float]]:
        try:
            near = similar_entities(release, Similar(kind=kind, id=id_, limit=_NEIGHBORS))
        except Problem:  # no vector, or no index: the page works without it
            return []
        return [(n.id, self._name(kind, n.id), n.score) for n in near]

    def _name(self, kind: Kind, id_: int) -> str:
        title = self._tables.titles([id_])[0] if kind == "item" else ""
        return title or f"{kind} {id_}"

    def _quality_of(self, release: Release, kind: Kind) -> dict[str, Any]:
        store = release.store
        ids = store.ids(kind, _SAMPLED)
        known = [k for k in store.get(kind, ids) if k]
        flags = Counter(flag for k in known if k.quality != "ok" for flag in k.quality.replace(",", " ").split())
        as_ofs = sorted(k.as_of for k in known)
        return {
            "kind": kind,
            "texts": store.count(kind),
            "sampled": len(known),
            "ok": sum(k.quality == "ok" for k in known),
            "flags": flags.most_common(6),
            "as_of": as_ofs[len(as_ofs) // 2] if as_ofs else 0,
        }


def _date(milliseconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d}" if milliseconds else "–"
    except (ValueError, OverflowError, OSError):  # beyond the calendar
        return str(milliseconds)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
