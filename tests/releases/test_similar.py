"""Nearest neighbors over a release and its deltas, compared with exact search over what the chain holds."""

import numpy as np
import pytest
from release_rows import Rows, tables

from owlrec.releases import build, open_release
from owlrec.releases import similar as similar_module
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.storage import fingerprint

DIM = 16


def published(workspace, label, rows, dim, parent=None):
    info = ReleaseInfo(fingerprint=fingerprint(label), model="m", encoder="e", parent=parent, delta=parent is not None)
    return publish(workspace, **tables(rows, dim), info=info)


def rows_of(ids, random):
    vectors = random.standard_normal((len(ids), DIM)) + 3 * random.standard_normal((1, DIM))
    return Rows(
        texts={("item", 0): (0, "a text", "ok")},
        vectors={("item", int(id_)): [row.tolist()] for id_, row in zip(ids, vectors, strict=True)},
    )


def exact(rows, question, k, without=()):
    kept = [(id_, rows.vectors["item", id_][0]) for _, id_ in rows.vectors if id_ not in without]
    ids, matrix = np.array([id_ for id_, _ in kept]), np.array([v for _, v in kept], dtype=np.float16).astype(float)
    scores = matrix @ question / np.linalg.norm(matrix, axis=1) / np.linalg.norm(question)
    order = np.argsort(-scores)[:k]
    return ids[order], scores[order]


@pytest.mark.parametrize("inverted", [False, True])
def test_a_chain_finds_what_exact_search_over_it_finds(workspace, monkeypatch, inverted):
    """Ids whose vector a delta replaced are found by the new one alone; so many that the first search is too narrow."""
    random = np.random.default_rng(1)
    if inverted:
        monkeypatch.setattr(similar_module, "_EXACT_UP_TO", 50)
        monkeypatch.setattr(similar_module, "_WANTED", 1.0)
    held = rows_of(range(1, 2001), random)
    manifest = published(workspace, "base", held, DIM)
    for number in range(2):
        newer = rows_of([*random.choice(2000, 900, replace=False) + 1, *range(3000 + 10 * number, 3005)], random)
        manifest = published(workspace, f"delta{number}", newer, DIM, manifest.name)
        held.update(newer)
    assert manifest.similar["item"].vectors == sum(kind == "item" for kind, _ in newer.vectors)
    assert manifest.similar["item"].recall >= (0.95 if inverted else 1)
    with open_release(workspace, similar=True) as release:
        found = []
        for _ in range(20):
            question = random.standard_normal(DIM).astype(np.float32)
            ids, scores = release.similar.nearest("item", question, 10)
            expected, cosines = exact(held, question, 10)
            np.testing.assert_allclose(scores, cosines, atol=0.05 if inverted else 2e-3)
            everything = dict(zip(*(column.tolist() for column in exact(held, question, 10**6)), strict=True))
            np.testing.assert_allclose([everything[id_] for id_ in ids.tolist()], scores, atol=2e-2)
            found.append(len(set(ids.tolist()) & set(expected.tolist())) / 10)
            gone = set(expected[:5].tolist())
            ids, _ = release.similar.nearest("item", question, 3, lambda ids: np.isin(ids, list(gone)))  # noqa: B023
            assert not gone & set(ids.tolist())
            assert len(ids) == 3
        assert np.mean(found) >= 0.9
        assert release.similar.nearest("user", question, 3)[0].tolist() == []
    with open_release(workspace) as release:
        assert release.similar is None


def test_many_parts_and_vectors_without_a_direction(workspace, monkeypatch):
    rows = Rows(texts={("item", 0): (0, "a text", "ok")}, vectors={("item", i): [[i, 1]] for i in range(40)})
    rows.vectors["item", 99] = [[0, 0]]
    rows.vectors["item", 98] = [[float("nan"), 1]]
    monkeypatch.setattr(build, "PART_IDS", 8)
    manifest = published(workspace, "parts", rows, 2)
    assert manifest.similar["item"].vectors == 40
    assert sum(file.endswith("-item.faiss") for file in manifest.files) == len(manifest.parts) == 8
    with open_release(workspace, similar=True) as release:
        ids, scores = release.similar.nearest("item", np.array([0, 2], np.float32), 50)
    assert ids.tolist() == list(range(40))
    np.testing.assert_allclose(scores, [1 / np.hypot(i, 1) for i in range(40)], atol=2e-3)
