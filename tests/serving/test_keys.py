"""API keys: hashed, named, several at once, and changed without a restart."""

import os

import pytest

from owlrec.errors import ServingError
from owlrec.serving import keys as keys_module
from owlrec.serving.guard import check_binding
from owlrec.serving.keys import KeyRing, new_key, parse_keys


@pytest.fixture(autouse=True)
def _look_every_time(monkeypatch):
    monkeypatch.setattr(keys_module, "_LOOK_AGAIN_S", 0.0)


def name_of(ring, key):
    found = ring.find(key)
    return found.name if found else None


def write(file, *lines):
    temporary = file.with_suffix(".new")
    temporary.write_text("\n".join(lines))
    os.replace(temporary, file)


def test_a_key_is_known_by_its_name_and_the_file_does_not_hold_it(tmp_path):
    (one, first), (two, second) = new_key("shop"), new_key("app-2")
    assert one not in first
    assert one[4:] not in first
    assert len(one) > 40
    write(tmp_path / "keys", "# production", first, "", second)
    ring = KeyRing(tmp_path / "keys")
    assert (name_of(ring, one), name_of(ring, two)) == ("shop", "app-2")
    assert [name_of(ring, k) for k in ("", "shop", one[:-1], one + "x", first.split()[2], "\ud800", "k" * 10**6)] == [
        None
    ] * 7


def test_the_same_key_stored_twice_has_two_salts():
    assert new_key("a")[1].split()[1] != new_key("a")[1].split()[1]


def test_keys_rotate_without_a_restart(tmp_path):
    (old, old_line), (new, new_line) = new_key("shop-1"), new_key("shop-2")
    write(tmp_path / "keys", old_line)
    ring = KeyRing(tmp_path / "keys")
    write(tmp_path / "keys", old_line, new_line)
    assert (name_of(ring, old), name_of(ring, new)) == ("shop-1", "shop-2")
    write(tmp_path / "keys", new_line)
    assert (name_of(ring, old), name_of(ring, new)) == (None, "shop-2")
    write(tmp_path / "keys", new_line, "a typing mistake")
    assert (name_of(ring, old), name_of(ring, new)) == (None, "shop-2")
    (tmp_path / "keys").unlink()
    assert name_of(ring, new) == "shop-2"
    write(tmp_path / "keys", "# nobody")
    assert name_of(ring, new) is None
    assert ring.required


def test_the_file_is_read_at_most_once_per_second(tmp_path, monkeypatch):
    monkeypatch.setattr(keys_module, "_LOOK_AGAIN_S", 60.0)
    (old, old_line), (new, new_line) = new_key("a"), new_key("b")
    write(tmp_path / "keys", old_line)
    ring = KeyRing(tmp_path / "keys")
    assert name_of(ring, old) == "a"
    write(tmp_path / "keys", new_line)
    assert (name_of(ring, old), name_of(ring, new)) == ("a", None)


def test_keys_may_come_as_text():
    key, line = new_key("ci")
    ring = KeyRing(text=line)
    assert ring.required
    assert name_of(ring, key) == "ci"
    assert not KeyRing().required


@pytest.mark.parametrize(
    "options",
    [
        "",
        "scopes=",
        "scopes=lookup,fly",
        "scopes=rank rate=0",
        "scopes=rank rate=x",
        "scopes=rank expires=soon",
        "scopes=rank scope=rank",
    ],
)
def test_an_option_that_cannot_be_meant_is_named(options):
    line = f"name {'0' * 32} {'0' * 64} {options}".strip()
    with pytest.raises(ServingError, match="keys, line 1: "):
        parse_keys(line, "keys")


@pytest.mark.parametrize("line", ["secret", "a b c", f"name {'0' * 32} {'0' * 63}", f"na:me {'0' * 32} {'0' * 64}"])
def test_a_broken_line_is_named_and_not_repeated(line):
    with pytest.raises(ServingError, match="keys, line 3: ") as error:
        parse_keys(f"\n# c\n{line}", "keys")
    assert line not in str(error.value)


def test_what_cannot_be_meant_is_refused(tmp_path):
    _, line = new_key("twice")
    with pytest.raises(ServingError, match="line 2: the name 'twice' occurs twice"):
        parse_keys(f"{line}\n{line}", "keys")
    with pytest.raises(ServingError, match="valid key name"):
        new_key("two words")
    with pytest.raises(ServingError, match="cannot be read"):
        KeyRing(tmp_path / "absent")
    (tmp_path / "empty").touch()
    with pytest.raises(ServingError, match="has no keys"):
        KeyRing(tmp_path / "empty")


def test_without_keys_only_loopback_may_be_bound():
    keyed = KeyRing(text=new_key("a")[1])
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1", None):
        assert check_binding(host, KeyRing()) is None
    for host in ("0.0.0.0", "::", "10.0.0.7", "example.org", "127.0.0.1.evil.org", "localhost.evil.org"):
        assert "no API key" in check_binding(host, KeyRing())
        assert check_binding(host, keyed) is None
