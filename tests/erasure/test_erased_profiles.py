"""Values of profiles that only one user had do not stay in vocabularies; all others keep their codes."""

import pyarrow as pa
from scanned import user

from owlrec.ctr.features import Grades, Vocabularies
from owlrec.ctr.trainer import VOCABULARIES, read_vocabularies, write_vocabularies
from owlrec.erasure.erased_rows import hide_values
from owlrec.workspace import Workspace


def test_only_what_nobody_else_has_is_hidden(small_world: Workspace) -> None:
    ages = [str(age) for age in range(18, 58)]  # one of each user
    vocabularies = Vocabularies(
        items=pa.array([100, 101], pa.int64()),
        attributes={"genres": pa.array(["22", "War"])},
        profile={"gender": pa.array(["female", "male"]), "age": pa.array(ages)},
        grades=Grades(1.0, 5.0),
    )
    for folder in ("ctr/a", "models/b"):
        write_vocabularies(small_world, folder, vocabularies)
    assert hide_values(small_world, user("5")) == (2, 2)
    for folder in ("ctr/a", "models/b"):
        rebuilt = read_vocabularies(small_world, folder)
        assert rebuilt.profile["gender"].to_pylist() == ["female", "male"]
        hidden = rebuilt.profile["age"].to_pylist()
        assert hidden[:4] + hidden[5:] == ages[:4] + ages[5:]
        assert hidden[4].startswith("forgotten-")
        assert rebuilt.attributes["genres"].to_pylist() == ["22", "War"]  # of films, not of users
    before = small_world.entry(f"ctr/a/{VOCABULARIES}")
    assert hide_values(small_world, user("nobody")) == (0, 0)
    assert small_world.entry(f"ctr/a/{VOCABULARIES}") == before
