"""The explorer in a real browser: search, open, swap, roll back, a phone's width, the keyboard alone, hostile text.

Screenshots stay in build/screenshots.
"""

import shutil
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from processes import free_port
from served_world import publish_world
from test_explorer_pages import by_ctr_alone, by_ctr_and_llm, explorer, write_tables

from owlrec.releases import roll_back
from owlrec.workspace import Workspace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
SHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("explorer") / "ws")
    publish_world(workspace, "first")
    write_tables(workspace)
    return workspace


def rank(asked):
    """An LLM that answers about every user but the second."""
    return by_ctr_alone(asked) if asked.user_id == 2 else by_ctr_and_llm(asked)


@pytest.fixture(scope="module")
def address(workspace, tmp_path_factory):
    port = free_port()
    app = explorer(workspace, tmp_path_factory.mktemp("indexes"), rank=rank)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(base_url=address)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(error.message))
    page.on("dialog", lambda dialog: page.problems.append(dialog.message))
    yield page
    assert page.problems == []
    page.close()


def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def test_search_and_open_a_user_and_an_item(page):
    page.goto("/")
    shot(page, "home")
    page.get_by_label("Id or title").fill("1")
    page.get_by_role("button", name="Find").click()
    page.get_by_role("link", name="user 1").click()
    assert page.get_by_text("first likes films").is_visible()
    shot(page, "user")
    page.get_by_role("link", name="War & Peace (1966)").click()
    assert page.get_by_role("heading", level=1).inner_text() == "War & Peace (1966)"
    assert page.get_by_text("Drama, War").is_visible()


def test_rankings_side_by_side_by_the_keyboard(page):
    page.goto("/user/1")
    page.get_by_label("Candidates").focus()
    page.keyboard.type("7, 9, 11, 12")
    page.keyboard.press("Enter")
    page.wait_for_url("**/rank?user=1&**")
    assert page.get_by_text("4 of 4 candidates moved").is_visible()
    columns = [page.get_by_role("region", name=f"By the {name}").locator("li") for name in ("CTR model", "LLM")]
    assert [one.count() for one in columns] == [4, 4]
    assert columns[0].first.inner_text().startswith("War & Peace (1966)")
    assert "▲ up 3" in columns[1].first.inner_text()
    left, right = (one.first.bounding_box() for one in columns)
    assert right["x"] > left["x"] + left["width"] / 2
    assert abs(right["y"] - left["y"]) < 2
    shot(page, "ranking")
    page.keyboard.press("Tab")  # from wherever the page begins
    page.get_by_label("Candidates").fill("")
    page.get_by_role("button", name="Rank by CTR and by LLM").press("Enter")
    page.wait_for_url("**candidates=")
    assert page.get_by_role("status").inner_text().startswith("No ranking: there are no candidates")


def test_without_the_llm_the_page_says_so(page):
    page.goto("/rank?user=2&candidates=7,9")
    assert page.get_by_role("status").inner_text().endswith("the LLM is not available.")
    assert page.get_by_role("region", name="By the LLM").get_by_text("It ranked nothing").is_visible()
    shot(page, "ranking-without-llm")


def test_a_swap_and_a_roll_back_are_seen(page, workspace):
    page.goto("/user/1")
    first = page.locator("#release").inner_text()
    second = publish_world(workspace, "second")
    reload_until(page, second)
    assert page.get_by_text("second likes films").is_visible()
    roll_back(workspace)
    reload_until(page, first)
    assert page.get_by_text("first likes films").is_visible()


def test_hostile_text_stays_text(page):
    page.goto("/user/2")
    assert page.get_by_text("<script>alert(1)</script>").is_visible()
    page.goto("/item/9")
    assert page.get_by_role("heading", level=1).inner_text() == "<img src=x onerror=alert(1)>"
    assert page.locator("main img, main script").count() == 0


def test_the_keyboard_is_enough(page):
    page.goto("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    for _ in range(3):
        page.keyboard.press("Tab")  # the title, the kind, the words
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search?**")
    page.locator("#main a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/user/5")
    assert page.get_by_text("It has no text of its own").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_sideways_scrolling(browser, address, scheme):
    page = browser.new_page(base_url=address, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    pages = {"home": "/", "user": "/user/1", "cohorts": "/user/5", "search": "/search?kind=item&q=a"}
    for name, path in {**pages, "ranking": "/rank?user=1&candidates=7,9,11"}.items():
        page.goto(path)
        shot(page, f"phone-{scheme}-{name}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.get_by_role("button", name="Find").bounding_box()["height"] >= 44
    background = page.evaluate("getComputedStyle(document.body).color")
    assert (background == "rgb(0, 0, 0)") == (scheme == "light")
    page.close()


def reload_until(page, release):
    end = time.monotonic() + 20
    while page.locator("#release").inner_text() != release:
        assert time.monotonic() < end
        time.sleep(0.1)
        page.reload()
