"""Values of profiles that only one user had do not stay in vocabularies; all others keep their codes."""

import pyarrow as pa
from scanned import user

from owlrec.ctr.features import FeatureSchema, Field, Grades, Vocabularies
from owlrec.ctr.trainer import VOCABULARIES, read_vocabularies, write_vocabularies
from owlrec.erasure.erased_rows import hide_values
from owlrec.workspace import Workspace


def test_only_what_nobody_else_has_is_hidden(small_world: Workspace) -> None:
    ages = [str(age) for age in range(18, 58)]  # one of each user
    vocabularies = Vocabularies(
        items=pa.array([100, 101], pa.int64()),
        values={
            "items/genres": pa.array(["22", "War"]),
            "users/gender": pa.array(["female", "male"]),
            "ages": pa.array(ages),
        },
        fields=FeatureSchema(
            items=(Field(column="genres", type="categorical", table="items/genres"),),
            users=(
                Field(column="gender", type="categorical", table="users/gender"),
                Field(column="age", type="categorical", table="ages"),
            ),
        ),
        grades=Grades(1.0, 5.0),
    )
    for folder in ("ctr/a", "models/b"):
        write_vocabularies(small_world, folder, vocabularies)
    assert hide_values(small_world, user("5")) == (2, 2)
    for folder in ("ctr/a", "models/b"):
        rebuilt = read_vocabularies(small_world, folder)
        assert rebuilt.values["users/gender"].to_pylist() == ["female", "male"]
        hidden = rebuilt.values["ages"].to_pylist()
        assert hidden[:4] + hidden[5:] == ages[:4] + ages[5:]
        assert hidden[4].startswith("forgotten-")
        assert rebuilt.values["items/genres"].to_pylist() == ["22", "War"]  # of films, not of users
    before = small_world.entry(f"ctr/a/{VOCABULARIES}")
    assert hide_values(small_world, user("nobody")) == (0, 0)
    assert small_world.entry(f"ctr/a/{VOCABULARIES}") == before
