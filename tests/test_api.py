"""The Python API: frames and dicts in, frames and cards out, raw ids at every door."""

import doctest
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import owlrec
from owlrec import api
from owlrec.ctr import model as adaptor
from owlrec.errors import RecipeError, ReleaseError, SchemaError, WorkspaceError
from owlrec.generation import EchoEngineConfig
from owlrec.ids import as_ids, stable_id
from owlrec.recipe import Recipe, load_recipe, make_recipe
from owlrec.releases import Release
from owlrec.releases.format import Knowledge
from owlrec.workspace import Workspace
from owlrec_decoding.pools import Text, read_texts

ROOT = Path(__file__).resolve().parent.parent
WALK = (ROOT / "docs" / "your-data.md").read_text()
BOOKS = pd.DataFrame(
    {"id": ["B1", "B2", "B3"], "title": ["Emma", "Dune", "Ulysses"], "author": ["Austen", "Herbert", "Joyce"]},
    index=[30, 10, 20],
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of docs/your-data.md's walk, its recipe with an encoder that needs no model."""
    folder = tmp_path_factory.mktemp("shop")
    code = re.findall(r'```python title="make_data.py"\n(.*?)```', WALK, re.S)[0]
    yaml = re.findall(r'```yaml title="shop.yaml"\n(.*?)```', WALK, re.S)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, {})
        Path("shop.yaml").write_text(yaml + "encoder: {model: hashing}\n")
        owlrec.run("shop.yaml", to="publish", quiet=True)
        yield folder


@pytest.fixture
def in_shop(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shop)
    return shop


@pytest.mark.parametrize("name", ["run", "open", "write_texts", "drafting", "Adaptor"])
def test_the_docstring_of_each_name_holds_an_example_that_runs(name: str, in_shop: Path) -> None:
    """Those of the clients: tests/client."""
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(recurse=False).find(getattr(owlrec, name), name, module=False, globs={}):
        assert test.examples
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.process
def test_importing_the_package_is_quick_and_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "vllm", "pandas", "numpy", "pyarrow", "pydantic")
    code = (
        "import sys, time; start = time.process_time(); import owlrec; took = time.process_time() - start; "
        f"assert set(owlrec.__all__) <= set(dir(owlrec)); print(took, [m for m in {heavy} if m in sys.modules]); "
        f"owlrec.run, owlrec.open, owlrec.drafting; print([m for m in ('torch','ray','vllm') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = ran.stdout.splitlines()
    took, _, loaded = first.partition(" ")
    assert float(took) < 0.1
    assert loaded == second == "[]"


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="ru"):
        owlrec.ru  # noqa: B018


# run


def test_run_takes_a_path_a_recipe_and_a_dict_alike(in_shop: Path) -> None:
    recipe = load_recipe("shop.yaml")
    values = json.loads(recipe.model_dump_json(exclude_defaults=True))
    values["source"]["items"] = in_shop / "data" / "items.parquet"  # a Path
    values["engine"] = EchoEngineConfig(type="echo")  # a Config
    cards = [owlrec.run(like, to="prepare", workspace=in_shop / "again", quiet=True) for like in (recipe, values)]
    assert [list(card) for card in cards] == [["prepare"], ["prepare"]]
    assert cards[0]["prepare"].fingerprint == cards[1]["prepare"].fingerprint
    assert recipe.workspace == "runs/shop"


def test_run_prints_what_the_command_prints_unless_it_is_quiet(
    in_shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owlrec.run("shop.yaml", to="prepare", quiet=True)
    assert capsys.readouterr().out == ""
    owlrec.run("shop.yaml", to="prepare")
    assert "prepare" in capsys.readouterr().out


@pytest.mark.parametrize("bounds", [{"to": "publsh"}, {"first": "encode", "to": "prepare"}])
def test_run_refuses_stages_that_are_none(in_shop: Path, bounds: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=next(iter(bounds.values()))):
        owlrec.run("shop.yaml", **bounds)  # type: ignore[arg-type]


def test_mistakes_in_a_dict_are_named_by_their_keys() -> None:
    with pytest.raises(RecipeError) as raised:
        make_recipe({"name": "x", "scenario": "boks", "engine": {"type": "echo", "latency": 1}})
    message = str(raised.value)
    assert all(part in message for part in ("scenario", "'books'", "engine.latency", "source", "workspace"))


# open


def test_a_release_answers_by_raw_ids_and_by_int64_ids(in_shop: Path) -> None:
    with owlrec.open("shop.yaml") as release, owlrec.open(Workspace("runs/shop")) as same:
        assert isinstance(release, Release)
        assert release.name == same.name
        assert len(release) == 60 + 40
        text = release["item", "B007"]
        assert text.id == stable_id("B007")
        assert release["item", text.id] == text
        assert release["user", 7] == release["user", "7"]
        assert [t and t.id for t in release.get("item", ["B999", "B007"])] == [None, text.id]
        raw = pd.Series(["B001", "B999", "B002"])
        vectors, known = release.vectors("item", raw)
        assert (vectors.dtype, vectors.shape, known.tolist()) == (np.float32, (3, 256), [True, False, True])
        np.testing.assert_array_equal(vectors[2], release.vectors("item", [stable_id("B002")])[0][0])
        codes, coded = release.codes("item", raw)
        assert codes.shape[0] == 3
        assert coded.tolist() == [True, False, True]


@pytest.mark.parametrize(("key", "named"), [(("item", "B999"), "B999"), (("itm", "B007"), "'item'")])
def test_what_is_unknown_is_a_key_error(in_shop: Path, key: Any, named: str) -> None:
    with owlrec.open("runs/shop") as release, pytest.raises(KeyError, match=named):
        release[key]


def test_there_is_nothing_to_open_before_publish(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="published"):
        owlrec.open(tmp_path)


def test_integers_are_int64_ids_and_texts_raw_ones() -> None:
    large = stable_id("B007")
    assert large > 10**17
    assert as_ids([large, "B007", np.int64(7), "7", "007"]).tolist() == [large, large, 7, 7, stable_id("007")]
    assert as_ids(np.array([3, 5], np.int32)).tolist() == [3, 5]
    assert as_ids(pd.Series([3, 5])).tolist() == [3, 5]
    for wrong in ("B007", [1.5], [None], [True]):
        with pytest.raises(SchemaError):
            as_ids(wrong)  # type: ignore[arg-type]


def test_a_text_shows_itself_in_a_notebook_without_its_markup() -> None:
    shown = Knowledge("user", 7, 86_400_000, "likes <b>war</b>\nand peace", "kar", "ok")._repr_html_()
    assert "likes &lt;b&gt;war&lt;/b&gt;<br>and peace" in shown
    assert "1970-01-02" in shown


# write_texts


def test_texts_come_back_in_the_frames_order_and_with_its_index() -> None:
    texts = owlrec.write_texts(BOOKS, scenario="books", llm="echo", quiet=True)
    assert texts.index.tolist() == [30, 10, 20]
    assert texts.columns.tolist() == ["id", "text", "quality", "error"]
    assert texts.id.tolist() == ["B1", "B2", "B3"]
    assert texts.text.str.startswith("echo-").all()
    assert texts.text.nunique() == 3
    assert texts.error.isna().all()
    assert texts.quality.tolist() == ["ok", "ok", "ok"]
    turned = owlrec.write_texts(BOOKS[::-1], scenario="books", llm={"type": "echo"}, quiet=True)
    assert turned.text.tolist() == texts.text.tolist()[::-1]


def test_a_row_that_fails_is_an_error_in_its_row() -> None:
    rows = [
        ("B1", "Emma", "Austen"),
        ("B1", "Emma again", "Austen"),
        (None, "Dune", "Herbert"),
        ("B4", None, None),
        ("B5", {"title": "Ulysses"}, "Joyce"),
        ("B6", "\ud800", "Joyce"),
        ("B7", "x" * 200_000, "Joyce"),
        (8, ["Middlemarch"], ["Eliot", "Evans"]),
        (9, "Silas Marner", ["Eliot", "Evans"]),
        (10, np.array(["Adam Bede", "Romola"]), "Eliot"),
        (11.0, "Felix Holt", float("nan")),
    ]
    frame = pd.DataFrame(rows, columns=["id", "title", "author"])
    texts = owlrec.write_texts(frame, scenario="books", llm="echo", quiet=True)
    errors = texts.error.fillna("").str.partition(":")[0].tolist()
    wrong = ["RepeatedId", "NoId", "EmptyPrompt", "WrongType", "UndecodableText", "OversizedText", "WrongType"]
    assert errors == ["", *wrong, "", "WrongType", ""]
    assert texts.text.notna().tolist() == [not error for error in errors]
    assert texts.quality.fillna("").tolist() == ["" if error else "ok" for error in errors]
    assert texts.id.tolist() == frame.id.tolist()
    assert "B4" in texts.error[3]
    assert "B7" in texts.error[6]


def test_a_frame_of_bad_rows_or_of_none_comes_back() -> None:
    frame = pd.DataFrame({"id": pd.Series([None, "", "\ud800"], dtype=object), "title": ["Emma", "Dune", "Ulysses"]})
    assert owlrec.write_texts(frame, scenario="books", llm="echo", quiet=True).error.str.startswith("NoId").all()
    assert len(owlrec.write_texts(frame[:0], scenario="books", llm="echo", quiet=True)) == 0


def test_texts_about_users_quote_what_they_did() -> None:
    users = pd.DataFrame({"id": [1, 2, 3], "gender": ["female", None, "male"]})
    interactions = pd.DataFrame(
        {
            "user_id": [1, 1, 2, 9],
            "item_id": ["B1", "B2", "B3", "B1"],
            "rating": [5, 1, 4, 5],
            "timestamp": pd.to_datetime(["2026-01-01", "2026-01-02", "2026-01-01", "2026-01-01"]),
        }
    )
    with asked() as (url, prompts):
        texts = owlrec.write_texts(
            users, scenario="books", llm=url, model="m", kind="user", items=BOOKS, interactions=interactions,
            quality={"policy": "off"}, quiet=True,
        )  # fmt: skip
    assert texts.error.isna().tolist() == [True, True, False]
    assert texts.error[2].startswith("NoBehavior")
    assert len(prompts) == 2
    first = next(prompt for prompt in prompts if "Emma" in prompt)
    assert "Dune" in first
    assert "Ulysses" not in first


def test_a_server_that_refuses_a_row_costs_that_row_alone() -> None:
    with asked(refused="Dune") as (url, _):
        texts = owlrec.write_texts(BOOKS, scenario="books", llm=url, model="m", quality={"policy": "off"}, quiet=True)
    assert texts.error.isna().tolist() == [True, False, True]
    assert texts.error[10].startswith("RequestRefused")


def test_in_a_workspace_that_is_kept_only_new_rows_are_asked_about(tmp_path: Path) -> None:
    options: dict[str, Any] = {"scenario": "books", "model": "m", "quality": {"policy": "off"}, "quiet": True}
    with asked(refused="Dune") as (url, _):
        owlrec.write_texts(BOOKS, llm=url, workspace=tmp_path, **options)
    with asked() as (url, prompts):
        more = pd.concat([BOOKS, pd.DataFrame({"id": ["B4"], "title": ["Middlemarch"], "author": ["Eliot"]})])
        texts = owlrec.write_texts(more, llm=url, workspace=tmp_path, **options)
    assert texts.error.isna().all()
    assert sorted(
        title for title in ("Emma", "Dune", "Ulysses", "Middlemarch") if any(title in p for p in prompts)
    ) == [
        "Dune",
        "Middlemarch",
    ]


def test_the_workspace_of_a_run_is_not_written_over(in_shop: Path) -> None:
    with pytest.raises(WorkspaceError, match="workspace of a run"):
        owlrec.write_texts(BOOKS, scenario="books", llm="echo", workspace="runs/shop", quiet=True)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"llm": "http://127.0.0.1:1/v1"}, RecipeError, "model"),
        ({"llm": "echo", "model": "m"}, RecipeError, "model"),
        ({"llm": "echo", "sampling": {"max_token": 1}}, RecipeError, "max_tokens"),
        ({"llm": "echo", "kind": "user"}, SchemaError, "interactions"),
    ],
)
def test_calls_that_cannot_be_meant_are_refused(options: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        owlrec.write_texts(BOOKS, scenario="books", quiet=True, **options)


def test_a_frame_without_titles_is_refused() -> None:
    with pytest.raises(SchemaError, match="'title'"):
        owlrec.write_texts(BOOKS.drop(columns="title"), scenario="books", llm="echo", quiet=True)


def test_a_bad_interaction_is_named_by_its_row() -> None:
    users, books = pd.DataFrame({"id": ["u"]}), BOOKS
    clicks = pd.DataFrame({"user_id": ["u", None], "item_id": ["B1", "B1"], "timestamp": [1_700_000_000_000] * 2})
    with pytest.raises(SchemaError, match="row 1"):
        owlrec.write_texts(
            users, scenario="books", llm="echo", kind="user", items=books, interactions=clicks, quiet=True
        )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_large_frame_goes_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_HERE_ROWS", 2)
    texts = owlrec.write_texts(BOOKS, scenario="books", llm="echo", quiet=True)
    assert texts.text.str.startswith("echo-").all()


class asked:
    """A chat-completions server; its address, and the prompts that it was asked. refused: a word that it answers
    with 422.
    """

    def __init__(self, refused: str = "") -> None:
        prompts: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                prompts.append(prompt)
                choice = {"message": {"content": f"About {prompt[:20]}."}, "finish_reason": "stop"}
                answer = json.dumps({"choices": [choice]}).encode()
                self.send_response(422 if refused and refused in prompt else 200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server, self._prompts = ThreadingHTTPServer(("127.0.0.1", 0), Handler), prompts

    def __enter__(self) -> tuple[str, list[str]]:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}/v1", self._prompts

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


# drafting


def drafted_from(arguments: dict[str, Any]) -> list[Text]:
    """The texts that an engine with these arguments reads when it starts."""
    return read_texts(arguments["additional_config"]["owlrec_decoding"]["texts"])


def test_drafting_reads_files_frames_and_sequences(tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text,id,pool\na film about owls,7,item\nanother,,\n")
    rows = [Text("a film about owls", 7, "item"), Text("another")]
    arguments = owlrec.drafting(file)
    assert arguments["additional_config"]["owlrec_decoding"]["config"]["mode"] == "strict"
    assert drafted_from(arguments) == rows
    frame = pd.read_csv(file)
    assert drafted_from(owlrec.drafting(frame)) == rows
    assert drafted_from(owlrec.drafting(pa.Table.from_pandas(frame))) == rows
    assert drafted_from(owlrec.drafting(["one", "two"])) == [Text("one"), Text("two")]
    assert owlrec.drafting()["additional_config"]["owlrec_decoding"]["texts"] is None
    (tmp_path / "texts.txt").write_text("x")
    for wrong in (tmp_path / "none.csv", tmp_path / "texts.txt", pd.DataFrame({"texts": ["x"]}), 7):
        with pytest.raises(RecipeError, match="texts: "):
            owlrec.drafting(wrong)


def test_drafting_takes_the_texts_of_the_current_release(in_shop: Path) -> None:
    with owlrec.open("shop.yaml") as release:
        known = release.get("item", release.store.ids("item"))
    texts = drafted_from(owlrec.drafting("shop.yaml"))
    assert {t.text for t in texts if t.pool == "item"} == {k.text for k in known if k}
    assert drafted_from(owlrec.drafting("runs/shop")) == texts
    with pytest.raises(RecipeError, match="has no release yet"):
        owlrec.drafting(Workspace(in_shop / "empty"))


def test_drafting_refuses_what_is_no_setting() -> None:
    with pytest.raises(RecipeError, match="'min_prob'"):
        owlrec.drafting(min_probs=0.3)
    assert owlrec.drafting(mode="off") == {}


# Adaptor


def test_an_adaptor_of_rows_is_that_of_distinct_ids() -> None:
    torch.manual_seed(0)
    model = owlrec.Adaptor(6, 3)
    users, items = torch.randn(4, 6), torch.randn(4, 6)
    users[2] = 0
    rows, known = torch.arange(4), torch.tensor([True, True, False, True])
    there = torch.ones(4, dtype=torch.bool)
    user_knowledge = adaptor.BatchVectors(users.unsqueeze(1), known.unsqueeze(1), rows)
    item_knowledge = adaptor.BatchVectors(items.unsqueeze(1), there.unsqueeze(1), rows)
    expected = model.fields(user_knowledge, item_knowledge)
    assert expected.shape == (4, 2, 3)
    torch.testing.assert_close(model(users, items), expected)  # zeros say that nothing is known
    users[2] = 5
    torch.testing.assert_close(model(users, items, (known, there)), expected)
    assert not torch.allclose(model(users, items)[2], expected[2])


def test_recipes_are_built_from_dicts_as_from_files(tmp_path: Path) -> None:
    values = {"name": "x", "scenario": "books", "engine": {"type": "echo"}, "source": {"type": "movielens-100k"}}
    assert Recipe.model_validate({**values, "workspace": tmp_path}).workspace == str(tmp_path)
