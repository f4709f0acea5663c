"""PCA of item vectors: what it keeps, whom it leaves out, and that a stale one is refused."""

import numpy as np
import pytest

from owlrec.encoding.compression import Projection, ProjectionSettings, fit_projection, unit_rows
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.workspace import Workspace


def plane(n: int = 200) -> np.ndarray:
    """Points of a plane in 5 dimensions, far from the origin, plus a little noise."""
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(n, 2)) * [3.0, 1.0]
    axes = np.array([[0, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
    return (flat @ axes + np.array([10, 0, 0, 0, 0]) + rng.normal(size=(n, 5)) * 1e-3).astype(np.float32)


def test_directions_of_most_variance_come_first_and_are_orthonormal() -> None:
    projection = fit_projection(plane(), ProjectionSettings(components=2))
    np.testing.assert_allclose(np.abs(projection.directions @ np.eye(5)[:, [2, 1]]), np.eye(2), atol=0.1)
    np.testing.assert_allclose(projection.directions @ projection.directions.T, np.eye(2), atol=1e-6)


def test_cosines_are_those_of_the_centered_vectors() -> None:
    vectors = plane()
    projected = fit_projection(vectors, ProjectionSettings(components=5)).apply(vectors)
    centered = unit_rows(vectors - vectors.mean(axis=0))
    np.testing.assert_allclose(projected @ projected.T, centered @ centered.T, atol=1e-4)
    uncentered = unit_rows(vectors) @ unit_rows(vectors).T
    assert uncentered.mean() > 0.7  # all are alike
    assert abs((projected @ projected.T).mean()) < 0.1


@pytest.mark.parametrize(("n", "wanted", "given"), [(3, 128, 3), (200, 128, 5), (200, 4, 4)])
def test_components_never_exceed_items_or_dimensions(n: int, wanted: int, given: int) -> None:
    projection = fit_projection(plane()[:n], ProjectionSettings(components=wanted))
    assert projection.directions.shape == (given, 5)
    assert projection.apply(plane()).shape == (200, given)


def test_rows_without_a_vector_are_neither_fitted_nor_projected() -> None:
    vectors = plane()
    holes = np.concatenate([vectors, np.zeros((2, 5)), np.full((1, 5), np.nan)]).astype(np.float32)
    fitted, clean = (fit_projection(v) for v in (holes, vectors))
    np.testing.assert_array_equal(fitted.center, clean.center)
    projected = fitted.apply(holes)
    np.testing.assert_array_equal(projected[-3:], 0)
    np.testing.assert_allclose(np.linalg.norm(projected[:-3], axis=1), 1, atol=1e-6)


def test_sample_is_the_seeds() -> None:
    few = ProjectionSettings(fit_items=20)
    same, again = (fit_projection(plane(), few) for _ in range(2))
    np.testing.assert_array_equal(same.directions, again.directions)
    assert not np.array_equal(fit_projection(plane(), ProjectionSettings(fit_items=20, seed=1)).center, same.center)


def test_nothing_to_fit_and_other_dimensions_are_refused() -> None:
    with pytest.raises(SchemaError, match="all 3"):
        fit_projection(np.zeros((3, 5)))
    with pytest.raises(SchemaError, match="all 0"):
        fit_projection(np.zeros((0, 5)))
    with pytest.raises(SchemaError, match=r"\(2, 4\).*\[n, 5\]"):
        fit_projection(plane()).apply(np.ones((2, 4)))


def test_saved_is_loaded_bit_for_bit_and_only_for_its_own_vectors(workspace: Workspace) -> None:
    projection = fit_projection(plane(), ProjectionSettings(components=3))
    projection.save(workspace, "ranker", "a" * 64)
    loaded = Projection.load(workspace, "ranker", "a" * 64)
    np.testing.assert_array_equal(loaded.apply(plane()), projection.apply(plane()))
    with pytest.raises(WorkspaceError, match=r"aaaaaaaa.*bbbbbbbb.*Fit"):
        Projection.load(workspace, "ranker", "b" * 64)


def test_damage_is_named(workspace: Workspace) -> None:
    fit_projection(plane()).save(workspace, "ranker", "a" * 64)
    data = workspace.read_bytes("ranker/projection.safetensors")
    workspace.write_bytes("ranker/projection.safetensors", data[:-1] + b"x")
    with pytest.raises(WorkspaceError, match="damaged"):
        Projection.load(workspace, "ranker", "a" * 64)
    workspace.write_json("ranker/projection.json", {})
    with pytest.raises(WorkspaceError, match="damaged"):
        Projection.load(workspace, "ranker", "a" * 64)
    with pytest.raises(WorkspaceError, match="does not exist"):
        Projection.load(workspace, "elsewhere", "a" * 64)
