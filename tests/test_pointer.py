"""Pointers: history, compare-and-swap, HOLD."""

import threading
from pathlib import Path

import pytest

from owlrec.errors import WorkspaceError
from owlrec.storage import Pointer, PointerHeld, PointerMoved, Storage


@pytest.fixture(params=["local", "memory"])
def pointer(request: pytest.FixtureRequest, tmp_path: Path) -> Pointer:
    return Pointer(Storage(tmp_path if request.param == "local" else f"memory://{tmp_path}"), "releases/CURRENT")


def test_it_names_what_it_was_moved_to_and_remembers_what_was_before(pointer: Pointer) -> None:
    assert pointer.current is None
    for name in ("a", "b", "b", "c"):
        pointer.move(name)
    assert (pointer.current, pointer.history) == ("c", ["a", "b", "c"])
    pointer.rewind("b")
    assert pointer.history == ["a", "b"]
    pointer.rewind("elsewhere")
    assert pointer.history == ["a", "b", "elsewhere"]


def test_a_move_that_expects_something_else_is_refused(pointer: Pointer) -> None:
    pointer.move("a", expected=None)
    with pytest.raises(PointerMoved, match="names 'a', not None"):
        pointer.move("b", expected=None)
    pointer.move("b", expected="a")
    assert pointer.current == "b"


def test_of_sixteen_that_move_from_the_same_place_one_does(pointer: Pointer) -> None:
    pointer.move("start")
    moved, refused = [], []

    def race(number: int) -> None:
        try:
            pointer.move(str(number), expected="start")
            moved.append(str(number))
        except PointerMoved:
            refused.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (moved, len(refused)) == ([pointer.current], 15)


def test_a_hold_stops_every_replacement_until_it_is_lifted(pointer: Pointer) -> None:
    pointer.move("a")
    pointer.hold("bad texts", "ana")
    for change in (lambda: pointer.move("b"), lambda: pointer.rewind("z")):
        with pytest.raises(PointerHeld, match="by ana: bad texts"):
            change()
    pointer.move("a")  # names it already: nothing is replaced
    assert pointer.held.reason == "bad texts"
    pointer.lift()
    pointer.move("b")
    assert pointer.history == ["a", "b"]


def test_what_is_not_a_pointer_says_what_to_do(pointer: Pointer) -> None:
    pointer.storage.write_bytes(pointer.path, b"{}")
    with pytest.raises(WorkspaceError, match="is not a pointer"):
        pointer.move("a")
