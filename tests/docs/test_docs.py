"""The documents tell the truth: links lead somewhere, commands and recipes are understood, examples do as they say."""

import contextlib
import hashlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import commands
import httpx
import numpy as np
import pytest
import yaml
from documents import DOCUMENTS, PAGES, ROOT, Block, anchors, blocks, inline_codes, links, name_of, prose
from pydantic.fields import FieldInfo

from owlrec.cli import app
from owlrec.config import Config, Registry
from owlrec.ops.cost import FleetConfig
from owlrec.recipe import Recipe, _models_in, _StrictLoader

# Commands stand in blocks without a language, or of "sh".
LANGUAGES = {"", "sh", "text", "yaml", "python", "json"}
TOP = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"build", "dist", "runs"}
BASE = {
    "name": "base",
    "scenario": "movies",
    "workspace": "runs/base",
    "source": {"type": "movielens-100k"},
    "engine": {"type": "echo"},
    "cohorts": {},
}
OTHER_YAML = {"rule_files"}  # first key of YAML that is another program's
WALK = ROOT / "docs" / "your-data.md"
WALK_SECTION = "A walkthrough on invented data"
HOST = "http://127.0.0.1:8000"  # without keys, applications answer to loopback alone

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


# (a) the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning is an error."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason=f"{module} is not installed: it comes with `make setup` (the extra `docs`)")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.process
def test_the_site_has_every_page_and_asks_no_other_server(site: Path) -> None:
    for page in PAGES:
        path = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / (path.parent if path.name == "index" else path) / "index.html").is_file(), page
    fetched = re.compile(
        r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\s\">]+|@import\s+url\(http"
    )
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        asked = [match[0] for match in fetched.finditer(file.read_text("utf-8"))]
        asked = [match for match in asked if 'rel="canonical"' not in match]
        assert not asked, f"{file.relative_to(site)}: {asked}"


@pytest.mark.process
def test_the_reference_shows_what_a_setting_is_for(site: Path) -> None:
    recipe, ctr = ((site / "reference" / name / "index.html").read_text("utf-8") for name in ("recipe", "ctr"))
    assert 'id="owlrec.ctr.experiment.CTRConfig"' in recipe
    assert "what is set adds to the defaults" in recipe  # a comment of QualityConfig: its source is shown
    shown = (ROOT / "docs" / "reference" / "recipe.md").read_text("utf-8").count("\n::: ")
    assert recipe.count('<details open class="mkdocstrings-source"') == shown
    assert "float32 [b, fields, width]" in ctr


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "pictures").glob("*.svg")), ids=lambda p: p.name)
def test_pictures_are_whole_and_used(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    assert root.findtext("{http://www.w3.org/2000/svg}title")
    assert "http" not in picture.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert any(link.endswith(f"pictures/{picture.name}") for page in PAGES for link in links(page))


# (b) links and paths


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    wrong = []
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if re.match(r"\w+:", link):
            wrong.append(f"{link}: a server's page, which may go")
        elif not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and not anchor.startswith(("owlrec.", "owlrec_decoding.")) and anchor not in anchors(target):
            wrong.append(f"{link}: no such heading")
    assert not wrong


@every_document
def test_reference_anchors_are_documented(document: Path) -> None:
    """Links to `owlrec.x.y` on a page of the reference: that page documents y of the module x, which exists."""
    for link in links(document):
        path, _, anchor = link.partition("#")
        if not anchor.startswith(("owlrec.", "owlrec_decoding.")):
            continue
        page = (document.parent / path).resolve() if path else document
        shown = re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.M)
        assert any(anchor == one or anchor.startswith(f"{one}.") for one in shown), link


@every_document
def test_reference_pages_name_what_exists(document: Path) -> None:
    for name in re.findall(r"^::: ([\w.]+)$", prose(document), re.M):
        path = ROOT / "platform" / Path(*name.split("."))
        if path.is_dir() or path.with_suffix(".py").is_file():
            continue
        module, _, member = name.rpartition(".")
        source = (ROOT / "platform" / Path(*module.split("."))).with_suffix(".py").read_text("utf-8")
        assert re.search(rf"^(class|def) {member}\b", source, re.M), name


@lru_cache
def file_names() -> set[str]:
    """The names of all files of the repository."""
    folders = [ROOT / name for name in TOP if (ROOT / name).is_dir()]
    return {path.name for folder in folders for path in folder.rglob("*")} | TOP


@every_document
def test_files_that_are_named_exist(document: Path) -> None:
    wrong = []
    for code in inline_codes(document):
        if not re.fullmatch(r"[\w./*-]+", code) or "//" in code:
            continue
        if "/" in code and code.split("/")[0] in TOP:
            there = bool(list(ROOT.glob(code))) if "*" in code else (ROOT / code).exists()
        elif re.fullmatch(r"[\w-]+\.(py|md)", code):
            there = code in file_names()
        else:
            continue
        if not there:
            wrong.append(code)
    assert not wrong


# (c) commands


@every_document
def test_blocks_have_a_known_language(document: Path) -> None:
    assert {block.language for block in blocks(document)} <= LANGUAGES


@every_document
def test_commands_are_understood(document: Path) -> None:
    wrong = []
    for block in blocks(document):
        if block.language not in ("", "sh"):
            continue
        for line in commands.lines_of(block.text):
            for words in commands.split(line):
                try:
                    commands.check(words)
                except commands.Wrong as error:
                    wrong.append(f"line {block.line}: {' '.join(words)}: {error}")
    assert not wrong


@every_document
def test_commands_in_sentences_are_understood(document: Path) -> None:
    wrong = []
    for code in inline_codes(document):
        if not re.match(r"(\.venv/bin/)?(owlrec|python|make|pytest|ray|serve|pip) [a-z'.-]", code):
            continue
        for words in commands.split(code):
            try:
                commands.check(words, partial=True)
            except commands.Wrong as error:
                wrong.append(f"{code}: {error}")
    assert not wrong


@every_document
def test_options_in_sentences_exist(document: Path) -> None:
    theirs = {"--no-deps", "--build-arg", "--entrypoint-num-cpus", "--help"}  # pip's, docker's, ray's, everybody's
    named = {word for code in inline_codes(document) if code.startswith("--") for word in re.findall(r"--[\w-]+", code)}
    assert named <= commands.every_option() | theirs


def test_a_wrong_command_is_noticed() -> None:
    for line in (
        "owlrec ran R",
        "owlrec run R --form encode",
        "python -m pipelines.generate R --retry-ded",
        "owlrec release rollbak R",
        "python -m benchmarks.decoding --batches 3",
        "python -m benchmarks.nothing",
        "make dmo",
        "pytest tests/nothing.py",
        "pip install '.[gpus]'",
        "ray job sumbit --address x -- python -m pipelines.generate R",
        "ray job submit --address x -- python -m pipelines.refresh",
        "serve deploy",
        "terraform apply",
        "kubectl apply -f cluster/nothing.yaml",
    ):
        (words,) = commands.split(line)
        with pytest.raises(commands.Wrong):
            commands.check(words)


# (d) recipes and Python


def explained(fragment: dict) -> str:
    """What is wrong with a part of a recipe, "" for nothing."""
    try:
        Recipe.model_validate({**BASE, **fragment})
    except ValueError as error:
        return str(error)
    return ""


@every_document
def test_yaml_is_a_part_of_a_recipe(document: Path) -> None:
    for block in blocks(document):
        if block.language != "yaml":
            continue
        values = yaml.load(block.text, Loader=_StrictLoader)
        if values.keys() <= Recipe.model_fields.keys():
            assert not explained(values), f"line {block.line}"
        elif "groups" in values:
            FleetConfig.model_validate(values)
        else:
            assert next(iter(values)) in OTHER_YAML, f"line {block.line}: neither a recipe nor a fleet"


@every_document
def test_yaml_in_sentences_is_a_part_of_a_recipe(document: Path) -> None:
    for code in inline_codes(document):
        if not re.match(r"\w+: ", code) or "…" in code:
            continue
        try:
            values = yaml.load(code, Loader=_StrictLoader)
        except yaml.YAMLError:
            continue
        if isinstance(values, dict) and values.keys() <= Recipe.model_fields.keys():
            assert not explained(values), code


def has_key(models: list[type[Config]], names: list[str]) -> bool:
    """Whether one of `models` has the key that `names` lead to."""
    fields = [m.model_fields[names[0]] for m in models if names[0] in m.model_fields]
    return bool(fields) and (
        len(names) == 1 or any(has_key(model, names[1:]) for f in fields if (model := models_of(f)))
    )


def models_of(field: FieldInfo) -> list[type[Config]]:
    """Configs that a field may hold: those its annotation names, and those of a registry that chooses by `type`."""
    chosen = [registry.load(name) for registry in field.metadata if isinstance(registry, Registry) for name in registry]
    return [*_models_in(field.annotation), *chosen]


@every_document
def test_recipe_keys_in_sentences_exist(document: Path) -> None:
    endings = r"(?!.*\.(?:py|yaml|json|jsonl|log|md|parquet|safetensors)$)"
    keys = {c for c in inline_codes(document) if re.fullmatch(rf"{endings}[a-z_]+(\.[a-z_]+)+", c)}
    unknown = [k for k in keys if k.split(".")[0] in Recipe.model_fields and not has_key([Recipe], k.split("."))]
    assert not set(unknown) - {"ray.data.llm"}  # a module


def pythons(document: Path) -> list[Block]:
    return [block for block in blocks(document) if block.language == "python"]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if pythons(d) and d.name != "serving.md"], ids=name_of)
def test_python_does_what_its_page_says(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page run one after another; where "prints" follows, what is printed is what stands there."""
    monkeypatch.chdir(tmp_path)
    text = document.read_text("utf-8")
    namespace: dict = {"__name__": "page"}
    for block in pythons(document):
        said = run_python(block, document, namespace)
        after = re.search(re.escape(block.text) + r"```\n\nprints\n\n```text\n(.*?)```", text, re.S)
        if after:
            assert said == after[1]


def run_python(block: Block, document: Path, namespace: dict) -> str:
    """Runs a block; what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * block.line + block.text, name_of(document), "exec"), namespace)
    return printed.getvalue()


# The walk, and what can be asked of what it published


class Walk:
    """The folder in which a reader of "Your own data" went through its first section, and what was printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.printed: list[tuple[str, str]] = []

    def output(self, command: str) -> list[str]:
        """What each call of a command printed."""
        return [said for line, said in self.printed if line.startswith(command)]


class QuickEncoder:
    """Stands in for the text encoder, whose loading would take half of this file's time."""

    dimension = 384

    def __init__(self, config: object) -> None:
        pass

    def encode(self, texts: Sequence[str], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """One vector a text, always the same one."""
        if on_batch:
            on_batch(len(texts))
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) for text in texts]
        rows = [np.random.default_rng(seed).standard_normal(self.dimension) for seed in seeds]
        return np.array(rows, np.float32).reshape(len(texts), self.dimension)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Iterator[Walk]:
    """Makes the files, runs the Python, runs each command, in the order of the page."""
    done = Walk(tmp_path_factory.mktemp("walk"))
    (done.folder / "cluster").symlink_to(ROOT / "cluster")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(done.folder)
        patched.setattr("owlrec.encoding.vectors.Encoder", QuickEncoder)
        for block in blocks(WALK):
            if block.section != WALK_SECTION:
                continue
            if block.title:
                (done.folder / block.title).write_text(block.text, "utf-8")
            if block.language == "python":
                run_python(block, WALK, {})
            elif block.language == "sh":
                for line in commands.lines_of(block.text):
                    for words in commands.split(line):
                        done.printed.append((" ".join(words), run_command(words)))
        yield done


def run_command(words: list[str]) -> str:
    """Runs an `owlrec` command in this process; what it printed. Fails where it does."""
    assert words[0] == "owlrec"
    printed, code = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            app(words[1:], standalone_mode=False)
        except SystemExit as end:
            code = end.code
    assert not code, f"{' '.join(words)}: {printed.getvalue()}"
    return printed.getvalue()


@pytest.mark.ray
def test_the_walk_publishes_looks_up_and_goes_back(walk: Walk) -> None:
    first, again = walk.output("owlrec run shop.yaml --to publish")
    (rows,) = re.findall(r"writing knowledge: (\d+)/\1 rows", first)
    assert int(rows) == 140  # 40 users as of half and now, 60 items
    assert "is current" in first
    assert "all 6 shards are already done" in again
    (looked_up,) = walk.output("owlrec lookup")
    assert looked_up.count("echo-") == 2
    assert (walk.folder / "knowledge.jsonl").read_text("utf-8").count("\n") == 80
    before, after = walk.output("owlrec release list")
    release = re.compile(r"\d{8}T\d{6}Z-\w{8}")
    assert (len(release.findall(before)), len(release.findall(after))) == (1, 2)
    assert "is current" in walk.output("owlrec release rollback")[0]
    current = [line for line in after.splitlines() if "*" in line]
    assert len(current) == 1
    assert release.findall(current[0]) == release.findall(before)


@pytest.mark.ray
def test_the_walk_plans(walk: Walk) -> None:
    (plan,) = walk.output("owlrec plan")
    assert "100,000 users, 10,000 items" in plan
    assert "GPU-hours" in plan


@pytest.mark.ray
def test_python_on_the_serving_page_gets_its_answers(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Clients ask the applications themselves, over the walk's release, in place of a server."""
    from fastapi.testclient import TestClient

    from owlrec.serving.guard import Limits, NoTelemetry
    from owlrec.serving.keys import KeyRing
    from owlrec.serving.knowledge_api import KnowledgeConfig, build_knowledge_api
    from owlrec.serving.rank_api import Cascade, build_rank_api
    from owlrec.serving.served import ServedReleases, WorkspaceReleases
    from owlrec.workspace import Workspace

    class Descending:
        async def score(self, asked: object, candidates: list[int]) -> list[float]:
            return [1.0 / (1 + place) for place in range(len(candidates))]

    async def ready() -> None:
        return None

    store = Workspace(walk.folder / "runs" / "shop")
    served, keys = ServedReleases(WorkspaceReleases(store, similar=True)), KeyRing(None, None)
    knowledge = build_knowledge_api(served, keys, KnowledgeConfig(), NoTelemetry())
    rank = build_rank_api(Cascade(Descending(), Descending()), keys, Limits(), NoTelemetry(), ready)
    printed = []
    with TestClient(knowledge, HOST) as knowledge_client, TestClient(rank, HOST) as rank_client:

        class Applications(httpx.BaseTransport):
            def handle_request(self, request: httpx.Request) -> httpx.Response:
                path = request.url.raw_path.decode()
                client = rank_client if path.startswith("/rank/") else knowledge_client
                answer = client.request(
                    request.method,
                    path.removeprefix("/rank"),
                    content=request.read(),
                    headers={n: v for n, v in request.headers.items() if n not in ("host", "content-length")},
                )
                return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

        original = httpx.Client.__init__
        monkeypatch.setattr(
            "owlrec.client.httpx.Client",
            type("Asks", (httpx.Client,), {"__init__": lambda self, **_: original(self, transport=Applications())}),
        )
        for block in pythons(ROOT / "docs" / "serving.md"):
            printed.append(run_python(block, ROOT / "docs" / "serving.md", {}))
    assert printed[0].startswith("echo-")
    assert "(3, 384)" in printed[0]
    assert printed[1] == "[10, 20] False\n"
