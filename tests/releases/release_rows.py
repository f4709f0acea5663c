"""Small tables to publish, and an independent answer to what a chain of releases holds: dicts, updated in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from owlrec.encoding.compression import Quantizer, SemanticIdConfig
from owlrec.releases import KnowledgeStore, ReleaseManifest
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.schema import BEHAVIORS, KNOWLEDGE, MEMBERSHIPS, vectors_schema
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

Key = tuple[str, int]  # kind, id
Behavior = tuple[int, int, float | None, float]  # time, item, rating, label
KINDS = ("user", "item", "cohort")
# A byte tells the codes of the first level apart, but not those of the second.
CODE_SIZES = (4, 300)
QUANTIZERS = {
    kind: Quantizer(
        SemanticIdConfig(levels=2, codes_per_level=512),
        tuple(np.full((size, 2), number, dtype=np.float32) for size in CODE_SIZES),
    )
    for number, kind in enumerate(("user", "item"))
}


@dataclass
class Rows:
    """What one release holds, or what a chain of them answers with after `update`."""

    texts: dict[Key, tuple[int, str, str]] = field(default_factory=dict)  # as_of, text, quality
    vectors: dict[Key, list[list[float]]] = field(default_factory=dict)  # a partition each, newest first
    cohorts: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    codes: dict[Key, tuple[int, ...]] = field(default_factory=dict)  # of users and items with a vector, digit last
    behaviors: dict[int, list[Behavior]] = field(default_factory=dict)  # of users, oldest first

    def update(self, newer: "Rows") -> None:
        self.texts |= newer.texts
        # A new vector takes the old one's codes away, whether or not it has codes itself.
        self.codes = {k: c for k, c in self.codes.items() if k not in newer.vectors} | newer.codes
        self.vectors |= newer.vectors
        self.cohorts |= newer.cohorts
        self.behaviors |= newer.behaviors

    def knowledge(self, kind: str, id_: int) -> tuple[int, str, str, str] | None:
        """as_of, text, framework, quality that `get` must give."""
        if (kind, id_) in self.texts:
            as_of, text, quality = self.texts[kind, id_]
            return as_of, text, "kar", quality
        known = [self.texts["cohort", c] for c in self.cohorts.get((kind, id_), ()) if ("cohort", c) in self.texts]
        if not known:
            return None
        return max(k[0] for k in known), "\n".join(k[1] for k in known), "collective", known[0][2]

    def partition(self, kind: str, id_: int, number: int) -> np.ndarray | None:
        """The vector that `partitions` must give in slot `number`."""
        own = self.vectors.get((kind, id_))
        if own:
            return np.array(own[number]) if number < len(own) else None
        groups = self.cohorts.get((kind, id_), ())
        known = [self.vectors["cohort", c][0] for c in groups if ("cohort", c) in self.vectors]
        if number or not known:
            return None
        mean = np.mean(np.array(known), axis=0)
        return mean / np.linalg.norm(mean) if np.any(mean) else None


def tables(rows: Rows, dim: int = 2) -> dict[str, list[pa.Table]]:
    """The arguments of `publish` for these rows."""
    defaults = {f.name: "kar" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
    texts = [
        {**defaults, "kind": kind, "id": id_, "as_of": as_of, "text": text, "quality": quality}
        for (kind, id_), (as_of, text, quality) in rows.texts.items()
    ]
    vectors = [
        {
            "kind": kind,
            "id": id_,
            "vector": np.array(vector, dtype=np.float16),
            "codes": [] if number else rows.codes.get((kind, id_), ()),
            "partition": number,
        }
        for (kind, id_), partitions in rows.vectors.items()
        for number, vector in enumerate(partitions)
    ]
    members = [{"kind": kind, "id": id_, "cohorts": cohorts} for (kind, id_), cohorts in rows.cohorts.items()]
    behaviors = [
        {"id": user, **{name: [(*row, 0)[at] for row in rows] for at, name in enumerate(BEHAVIORS.names[1:])}}
        for user, rows in rows.behaviors.items()
    ]
    with_partition = vectors_schema(dim).append(pa.field("partition", pa.int8()))
    return {
        "knowledge": [pa.Table.from_pylist(texts, KNOWLEDGE)],
        "vectors": [pa.Table.from_pylist(vectors, with_partition)],
        "memberships": [pa.Table.from_pylist(members, MEMBERSHIPS)],
        "behaviors": [pa.Table.from_pylist(behaviors, BEHAVIORS)],
    }


def texts(values: Mapping[Key, str]) -> Rows:
    """Rows that hold texts alone, all as of 1000."""
    return Rows(texts={key: (1000, text, "ok") for key, text in values.items()})


def publish_rows(workspace: Workspace, label: str, rows: Rows, delta_of: str | None = None) -> ReleaseManifest:
    """Publishes rows, in full or as a delta; the fingerprint is that of `label`."""
    info = ReleaseInfo(
        fingerprint=fingerprint(label), model="m", encoder="e", parent=delta_of, delta=delta_of is not None
    )
    return publish(workspace, **tables(rows), quantizers=None if delta_of else QUANTIZERS, info=info)


def listed(rows: np.ndarray | None) -> list[Behavior] | None:
    """Behaviors as a release gives them, None in place of NaN."""
    return rows if rows is None else [(t, i, None if r != r else r, label) for t, i, r, label, _ in rows.tolist()]


def check(store: KnowledgeStore, rows: Rows, ids: range) -> None:
    """Every answer of a store is what the dicts say."""
    assert [listed(stored) for stored in store.behaviors(ids)] == [rows.behaviors.get(i) for i in ids]
    for kind in KINDS:
        stored = [k and (k.as_of, k.text, k.framework, k.quality) for k in store.get(kind, ids)]
        assert stored == [rows.knowledge(kind, i) for i in ids]
        assert store.cohorts(kind, ids) == [rows.cohorts.get((kind, i), ()) for i in ids]
        codes, coded = store.codes(kind, np.array(ids))
        assert codes.dtype == np.uint16
        expected_codes = [rows.codes.get((kind, i)) for i in ids]
        assert [tuple(c) if there else None for c, there in zip(codes.tolist(), coded, strict=True)] == expected_codes
        assert not codes[~coded].any()
        own = sorted(i for k, i in rows.texts if k == kind)
        assert (store.count(kind), store.ids(kind).tolist(), store.ids(kind, 2).tolist()) == (len(own), own, own[:2])
        for n in (1, 3):
            vectors, mask = store.partitions(kind, np.array(ids), n)
            expected = [[rows.partition(kind, i, p) for p in range(n)] for i in ids]
            assert mask.tolist() == [[v is not None for v in slots] for slots in expected]
            for row, slots in enumerate(expected):
                for slot, vector in enumerate(slots):
                    np.testing.assert_allclose(vectors[row, slot], 0 if vector is None else vector, atol=1e-6)
        newest, has = store.vectors(kind, ids)
        assert newest.tobytes() == vectors[:, 0].tobytes()
        assert has.tolist() == mask[:, 0].tolist()


# A full release and two deltas on top of it.
FULL = Rows(
    texts={("user", 1): (1000, "one", "ok"), ("user", 3): (1000, "three", "ok"), ("cohort", 8): (2000, "war", "ok")},
    vectors={("user", 1): [[1, 0], [2, 0]], ("cohort", 8): [[3, 4]]},
    cohorts={("user", 2): (8,)},
    codes={("user", 1): (3, 299, 0)},
    behaviors={1: [(10, 5, None, 1.0), (20, 6, 0.5, 0.0)], 9: [(30, 7, 4.0, 1.0)]},
)
DELTAS = [
    Rows(
        texts={("user", 1): (3000, "uno", "ok"), ("item", 5): (0, "film", "short")},
        vectors={("user", 1): [[5, 5]], ("item", 5): [[0, 1]]},
        codes={("item", 5): (1, 256, 300)},
        behaviors={1: [(20, 6, 0.5, 0.0), (40, 8, None, 1.0)]},
    ),
    Rows(texts={("cohort", 8): (4000, "peace", "ok")}, cohorts={("user", 4): (8,), ("user", 2): ()}),
]


def publish_chain(workspace: Workspace) -> list[str]:
    """A full release and two deltas, the last one current: their names, oldest first."""
    names = [publish_rows(workspace, "full", FULL).name]
    for number, rows in enumerate(DELTAS):
        names.append(publish_rows(workspace, f"delta {number}", rows, delta_of=names[-1]).name)
    return names


def answers() -> Rows:
    """What the chain of `publish_chain` answers with."""
    rows = Rows()
    for newer in (FULL, *DELTAS):
        rows.update(newer)
    return rows
