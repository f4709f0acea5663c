"""PCA of vectors: the space in which ReLLa (WWW 2024) compares items, fitted once per set of vectors; without a center,
it reduces knowledge for the CTR models (ctr.reduction).

ReLLa reduces 5,120 components to 512. Its few-shot AUC changes by at most .003 from 512 to 64, so the default
is a cheaper 128. Centering matters, too: vectors of similar texts share a large common direction, which makes all
cosines alike until it is removed.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from owlrec.errors import SchemaError, WorkspaceError
from owlrec.workspace import Workspace

_VERSION = 1  # of the files of `save`
_ROWS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class ProjectionSettings:
    """Number of components, and number of items for the fit. No recipe sets these."""

    components: int = 128  # maximum; also limited by the vectors' dimension and the number of items
    fit_items: int = 32_768  # random sample: with 384 dimensions the SVD then takes seconds
    seed: int = 0


PROJECTION = ProjectionSettings()


@dataclass(frozen=True, eq=False)
class Projection:
    """A center, and orthonormal directions in decreasing order of variance."""

    center: np.ndarray  # float32 [d]
    directions: np.ndarray  # float32 [c, d]

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """`vectors` in the fitted space, scaled to length 1.

        vectors: float [n, d]. Returns float32 [n, c]; a row that is zero or not finite (an item without text)
        becomes zeros. Raises SchemaError if d differs from the fit.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self.center):
            raise SchemaError(
                f"vectors have shape {vectors.shape}, but the projection was fitted on [n, "
                f"{len(self.center)}]. Fit it again on these vectors, or use the encoder it was fitted for."
            )
        projected = np.zeros((len(vectors), len(self.directions)), dtype=np.float32)
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            block = np.asarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
            usable = _usable(block)
            projected[start : start + len(block)][usable] = (block[usable] - self.center) @ self.directions.T
        return unit_rows(projected)

    def save(self, workspace: Workspace, folder: str, fingerprint: str) -> None:
        """Writes projection.safetensors into `folder` and then projection.json, which completes it.

        fingerprint: of the item vectors' inputs; `load` refuses another.
        """
        from safetensors.numpy import save  # here, since retrieval does not need it

        data = save({"center": self.center, "directions": np.ascontiguousarray(self.directions)})
        about = {"version": _VERSION, "fingerprint": fingerprint, "sha256": hashlib.sha256(data).hexdigest()}
        workspace.write_bytes(f"{folder}/projection.safetensors", data)
        workspace.write_json(f"{folder}/projection.json", about)

    @classmethod
    def load(cls, workspace: Workspace, folder: str, fingerprint: str) -> "Projection":
        """Loads what `save` wrote. Raises WorkspaceError if it is missing, damaged, or fitted on other vectors."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        where = workspace.path(folder, "projection.json")
        about = workspace.read_json(f"{folder}/projection.json")
        data = workspace.read_bytes(f"{folder}/projection.safetensors")
        try:
            if about["version"] != _VERSION or about["fingerprint"] != fingerprint:
                raise WorkspaceError(
                    f"{where} has version {about['version']} and item vectors {about['fingerprint'][:8]}, but "
                    f"version {_VERSION} and {fingerprint[:8]} are expected. Fit the projection again."
                )
            if about["sha256"] != hashlib.sha256(data).hexdigest():
                raise ValueError("its checksum does not match")
            arrays = load(data)
            return cls(arrays["center"], arrays["directions"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise WorkspaceError(
                f"{where}: the projection is damaged ({error!r}). Delete the folder and fit it again."
            ) from None


def fit_projection(
    vectors: np.ndarray, settings: ProjectionSettings = PROJECTION, *, centered: bool = True
) -> Projection:
    """Principal directions of vectors: an SVD of a seeded sample of those that are finite and not zero.

    vectors: float [n, d]. centered: False uses the origin as the center, so vectors keep their common part. Has
    min(components, d, items used) directions. Raises SchemaError if no vector is usable.
    """
    usable = np.flatnonzero(
        np.concatenate(
            [
                np.zeros(0, dtype=bool),
                *(_usable(vectors[start : start + _ROWS_AT_ONCE]) for start in range(0, len(vectors), _ROWS_AT_ONCE)),
            ]
        )
    )
    if not len(usable):
        raise SchemaError(
            f"vectors: all {len(vectors)} are zero or not finite, so nothing can be fitted. Encode the texts."
        )
    if len(usable) > settings.fit_items:
        drawn = np.random.default_rng(settings.seed).choice(usable, settings.fit_items, replace=False)
        usable = np.sort(drawn)
    sample = np.asarray(vectors[usable], dtype=np.float64)
    center = sample.mean(axis=0) if centered else np.zeros(sample.shape[1])
    # SVD of the covariance: the same directions as of the data, at a fraction of the cost.
    _, _, directions = np.linalg.svd((sample - center).T @ (sample - center), hermitian=True)
    kept = min(settings.components, len(sample))
    return Projection(center.astype(np.float32), directions[:kept].astype(np.float32))


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """`vectors` scaled to length 1: float32 [n, d]; a row that is zero or not finite becomes zeros."""
    unit = np.zeros(vectors.shape, dtype=np.float32)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        block = np.asarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float64)
        usable = _usable(block)
        lengths = np.sqrt(np.einsum("ij,ij->i", block, block))
        unit[start : start + len(block)][usable] = block[usable] / lengths[usable, None]
    return unit


def _usable(vectors: np.ndarray) -> np.ndarray:
    """bool [n]: rows that are finite and not zero."""
    return np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
