"""Smaller forms of vectors, fitted once per set of vectors: a PCA's components, and semantic ids."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, ValidationError, field_validator

from owlrec.config import Config
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.ids import shard_of
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

if TYPE_CHECKING:
    import faiss


# ----------------------------------------------------------------------------------------------------------- projection
# PCA of vectors: the space in which ReLLa (WWW 2024) compares items, fitted once per set of vectors; with a center for
# each table, it reduces knowledge for the CTR models (ctr.dataset).
#
# ReLLa reduces 5,120 components to 512. Its few-shot AUC changes by at most .003 from 512 to 64, so the default
# is a cheaper 128. Centering matters, too: vectors of similar texts share a large common direction, which makes all
# cosines alike until it is removed.


_VERSION = 1  # of the files of `save`
_CENTER = "center/"
_NEGLIGIBLE = 2e-3  # twice the relative precision of float16
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
    centers: Mapping[str, np.ndarray] = field(default_factory=dict)  # of single tables, by name

    def of(self, table: str) -> "Projection":
        """The same directions around a table's own center, if it has one."""
        return replace(self, center=self.centers.get(table, self.center))

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """`vectors` in the fitted space, scaled to length 1.

        vectors: float [n, d]. Returns float32 [n, c]; a row that is zero or not finite (an item without text), or that
        equals the center, becomes zeros. Raises SchemaError if d differs from the fit.
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
            centered = (block[usable] - self.center) @ self.directions.T
            # A vector that equals the center says nothing: its direction would be that of its rounding.
            lengths = np.linalg.norm(centered, axis=1), np.linalg.norm(block[usable], axis=1)
            centered[lengths[0] < _NEGLIGIBLE * lengths[1]] = 0
            projected[start : start + len(block)][usable] = centered
        return unit_rows(projected)

    def save(self, workspace: Workspace, folder: str, fingerprint: str) -> None:
        """Writes projection.safetensors into `folder` and then projection.json, which completes it.

        fingerprint: of the item vectors' inputs; `load` refuses another.
        """
        from safetensors.numpy import save  # here, since retrieval does not need it

        named = {f"{_CENTER}{name}": center for name, center in self.centers.items()}
        data = save({"center": self.center, "directions": np.ascontiguousarray(self.directions), **named})
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
            centers = {n.removeprefix(_CENTER): c for n, c in arrays.items() if n.startswith(_CENTER)}
            return cls(arrays["center"], arrays["directions"], centers)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise WorkspaceError(
                f"{where}: the projection is damaged ({error!r}). Delete the folder and fit it again."
            ) from None


def fit_projection(vectors: np.ndarray, settings: ProjectionSettings = PROJECTION) -> Projection:
    """Principal directions of vectors: an SVD of a seeded sample of those that are finite and not zero.

    vectors: float [n, d]. Has min(components, d, items used) directions. Raises SchemaError if no vector is usable.
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
    center = sample.mean(axis=0)
    _, directions = _principal(sample - center)
    kept = min(settings.components, len(sample))
    return Projection(center.astype(np.float32), directions[:kept].astype(np.float32))


def fit_variance(tables: Mapping[str, np.ndarray], share: float) -> Projection:
    """Principal directions that keep at least `share` of the variance of several tables, each around its own mean:
    texts about users, about items, and metadata each have a large common direction of their own.

    tables: name -> a sample, float [n, d]; rows that are zero or not finite are left out. Raises SchemaError if no
    row is usable.
    """
    samples = {name: np.asarray(rows, np.float64)[_usable(np.asarray(rows))] for name, rows in tables.items()}
    samples = {name: rows for name, rows in samples.items() if len(rows)}
    if not samples:
        raise SchemaError("vectors: all are zero or not finite, so nothing can be fitted. Encode the texts.")
    centers = {name: rows.mean(axis=0) for name, rows in samples.items()}
    variances, directions = _principal(np.concatenate([rows - centers[name] for name, rows in samples.items()]))
    total = variances.sum()
    kept = 1 if total == 0 else int(np.searchsorted(np.cumsum(variances) / total, share - 1e-9)) + 1
    kept = min(kept, max(1, int((variances > 1e-12 * max(total, 1e-300)).sum())))
    means = {name: center.astype(np.float32) for name, center in centers.items()}
    center: np.ndarray = np.stack(list(means.values())).mean(axis=0)
    return Projection(center, directions[:kept].astype(np.float32), means)


def _principal(centered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances (unscaled) and directions, by an SVD of the covariance: the same as of the data, much cheaper."""
    _, variances, directions = np.linalg.svd(centered.T @ centered, hermitian=True)
    return variances, directions


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


# --------------------------------------------------------------------------------------------------------- semantic ids
# Vectors -> semantic ids: a few small codes per vector, coarse to fine, by residual quantization.
#
# Each level codes the residual of the levels before it, so vectors with a common prefix are alike (TIGER, NeurIPS 2023,
# sec. 3.1; AutoGraph, KDD 2025, codes LLM knowledge this way, with 3 levels of 256). The codebooks come from k-means,
# not from an RQ-VAE, which gains little in the comparisons we know and is less stable to train. Three codes of 8 bits
# represent a vector of kilobytes: in a store or as a categorical feature.


# --------------------------------------------------------------------------------------------------------- packed codes
# Semantic ids as bytes: one per level (two if it has more than 256 codes), then the duplicate digit, if it is not 0.
#
# The digit takes as few bytes as it needs, and none for 0, so an id of 3 x 256 codes is 3 bytes, or 4 if
# others share its codes. Bytes sort like the codes: a common prefix means similarity.


_ONE_BYTE = 1 << 8


def pack_codes(codes: np.ndarray, sizes: Sequence[int]) -> list[bytes]:
    """Semantic ids as bytes: integers [n, levels + 1], the digit last; sizes: number of codes per level.

    Raises SchemaError for another number of levels, and for a code outside its level.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] != len(sizes) + 1:
        raise SchemaError(
            f"semantic ids: the shape is {list(codes.shape)}, but must be [n, {len(sizes) + 1}]: {len(sizes)} "
            "codes and the duplicate digit. Use the release's quantizer."
        )
    check_codes(codes[:, :-1], sizes, "Use the release's quantizer.")
    columns = [codes[:, level : level + 1].astype(f">u{_width(size)}") for level, size in enumerate(sizes)]
    heads = np.concatenate([np.ascontiguousarray(column).view(np.uint8) for column in columns], axis=1)
    return [head.tobytes() + _digit_bytes(digit) for head, digit in zip(heads, codes[:, -1].tolist(), strict=True)]


def check_codes(codes: np.ndarray, sizes: Sequence[int], remedy: str) -> None:
    """Raises SchemaError, ending with the remedy, for a code [n, levels] outside its level."""
    bad = np.argwhere((codes < 0) | (codes >= np.array(sizes)))
    if len(bad):
        row, level = bad[0]
        raise SchemaError(
            f"semantic ids, row {row}: code {codes[row, level]} is out of range: level {level} has "
            f"{sizes[level]} codes. {remedy}"
        )


def unpack_codes(value: bytes, sizes: Sequence[int]) -> tuple[int, ...]:
    """Codes and, last, the duplicate digit from a value of `pack_codes`."""
    codes, at = [], 0
    for size in sizes:
        codes.append(int.from_bytes(value[at : at + _width(size)], "big"))
        at += _width(size)
    return (*codes, int.from_bytes(value[at:], "big"))


def packed_bytes(digits: Iterable[int], sizes: Sequence[int]) -> int:
    """Number of bytes of the semantic ids with these duplicate digits."""
    return sum(len(_digit_bytes(digit)) + sum(map(_width, sizes)) for digit in digits)


def _width(size: int) -> int:
    return 1 if size <= _ONE_BYTE else 2


def _digit_bytes(digit: int) -> bytes:
    return digit.to_bytes((digit.bit_length() + 7) // 8, "big")


# --------------------------------------------------------------------------------------------------------- semantic ids


_CODED_AT_ONCE = 1 << 13  # per encoding batch: the beam search then takes about 200 MB at d = 384
_FILE = "codebooks.safetensors"


TRAIN_SAMPLE = 1 << 15  # training vectors of codebooks; training takes 2 x _BEAM times their memory
SEED = 0  # for the sample and k-means; faiss takes a negative one from the clock
_BEAM = 5  # faiss's default: a worse code on one level can win through a better next one
_ITERATIONS = 20  # of k-means; more change the error by less than seeds differ
# Inputs of the codes besides SemanticIdConfig, for fingerprints.
CODING = f"faiss residual, beam {_BEAM}, {_ITERATIONS} iterations, {TRAIN_SAMPLE} vectors, seed {SEED}"


class SemanticIdConfig(Config):
    """Resolution of the ids."""

    levels: int = Field(3, ge=1, le=16)
    codes_per_level: int = Field(256, ge=2, le=1 << 16)  # a power of two; a code is a uint16

    @classmethod
    def parse(cls, text: str) -> "SemanticIdConfig":
        """Of "3x256": three levels of 256 codes. Raises ValueError, which says what is wrong."""
        levels, x, codes = text.partition("x")
        if not (x and levels.isdecimal() and codes.isdecimal()):
            raise ValueError("must be levels and codes per level, such as 3x256")
        try:
            return cls(levels=int(levels), codes_per_level=int(codes))
        except ValidationError as error:
            raise ValueError("; ".join(f"{d['loc'][0]} {d['msg']}" for d in error.errors())) from None

    @field_validator("codes_per_level")
    @classmethod
    def _whole_bits(cls, codes: int) -> int:
        lower = 1 << (codes.bit_length() - 1)
        if codes != lower:
            raise ValueError(f"must be a power of two: {lower} or {2 * lower}")
        return codes


@dataclass(frozen=True)
class Quantizer:
    """Trained codebooks. A vector is near the sum of its codes' centroids, one per level."""

    config: SemanticIdConfig
    codebooks: tuple[np.ndarray, ...]  # float32 [k, d], one per level; k <= config.codes_per_level

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return int(self.codebooks[0].shape[1])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes per level."""
        return tuple(len(book) for book in self.codebooks)

    def encode(self, vectors: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Codes of vectors: float [n, d] to uint16 [n, levels].

        Raises SchemaError for a vector of another dimension, or one that is not finite.
        """
        vectors = _checked(vectors, self.dim)
        codes = np.empty((len(vectors), len(self.codebooks)), dtype=np.uint16)
        for rows in _slices(len(vectors)):
            codes[rows] = self._beam_search(vectors[rows])
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Vectors of codes: integers [n, levels] to float32 [n, d].

        Encoding these again may give other codes, if another sum of centroids is as near.
        Raises SchemaError for codes of another shape or outside their level.
        """
        codes, levels = np.asarray(codes), len(self.codebooks)
        if codes.ndim != 2 or codes.shape[1] != levels:
            raise SchemaError(
                f"semantic ids: the codes have shape {list(codes.shape)}, but this quantizer's have [n, "
                f"{levels}]. Drop the duplicate digit, and use the quantizer that produced them."
            )
        check_codes(codes, self.sizes, "Use the quantizer that produced it.")
        vectors = np.zeros((len(codes), self.dim), dtype=np.float32)
        for level, book in enumerate(self.codebooks):
            vectors += book[codes[:, level]]
        return vectors

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the codebooks and the search settings, on which codes depend."""
        books = [hashlib.sha256(np.ascontiguousarray(book).tobytes()).hexdigest() for book in self.codebooks]
        return fingerprint("beam", _BEAM, self.dim, books)

    def save(self, workspace: Workspace, folder: str) -> None:
        """Writes the codebooks into a folder of the workspace unless there are some: the first writer wins."""
        from safetensors.numpy import save  # here, since the recipe imports this module and the base install lacks it

        books = {str(level): np.ascontiguousarray(book) for level, book in enumerate(self.codebooks)}
        about = {"config": self.config.model_dump_json(), "fingerprint": self.fingerprint}
        workspace.create_bytes(f"{folder}/{_FILE}", save(books, about))

    @classmethod
    def load(cls, workspace: Workspace, folder: str) -> "Quantizer":
        """Loads the file of `save`. Raises WorkspaceError if it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        data = workspace.read_bytes(f"{folder}/{_FILE}")
        try:
            books = load(data)
            about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            config = SemanticIdConfig.model_validate_json(about["config"])
            quantizer = cls(config, tuple(books[str(level)] for level in range(len(books))))
            if quantizer.fingerprint != about["fingerprint"]:
                raise ValueError("their fingerprint does not match")
        except (SafetensorError, KeyError, ValueError) as error:
            raise WorkspaceError(
                f"{workspace.path(folder, _FILE)}: the codebooks are damaged ({error}). Delete the folder and run "
                "`encode` again."
            ) from None
        return quantizer

    def _beam_search(self, vectors: np.ndarray) -> np.ndarray:
        import faiss

        bits = len(self.codebooks[0]).bit_length() - 1
        quantizer = _residual_quantizer(self.dim, bits, len(self.codebooks))
        faiss.copy_array_to_vector(np.concatenate(self.codebooks).ravel(), quantizer.codebooks)
        quantizer.is_trained = True
        quantizer.use_beam_LUT = 1  # distances from product tables: four times as fast, .3 % of codes differ
        quantizer.compute_codebook_tables()  # type: ignore[attr-defined]
        return faiss.unpack_bitstrings(quantizer.compute_codes(vectors), len(self.codebooks), bits)


def train_quantizer(
    vectors: np.ndarray | Sequence[np.ndarray],
    config: SemanticIdConfig,
    *,
    sample: int = TRAIN_SAMPLE,
    seed: int = SEED,
) -> Quantizer:
    """Codebooks for vectors (float [n, d]), deterministic for a seed.

    sample: maximum number of training vectors. With fewer distinct vectors than codes_per_level, levels have fewer
    codes. Raises SchemaError if there is no vector, if they differ in size, or if one is not finite.
    """
    vectors = _checked(vectors)
    if len(vectors) > sample:
        rows = np.random.default_rng(seed).choice(len(vectors), sample, replace=False)
        vectors = vectors[np.sort(rows)]
    return Quantizer(config, _train(vectors, config, seed))


def code_vectors(quantizer: Quantizer, ids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Semantic ids of `ids`: uint16 [n, levels + 1], the codes of each vector and a last digit that separates ids with
    equal codes (TIGER, sec. 3.1).

    The digit is 16 bits of a hash of the id, not a count over all ids: it depends on no other id, and stays the same in
    every shard and refresh. Two ids with equal codes share the digit with probability 2^-16.
    ids: int64 [n]; vectors: float [n, d], aligned. Raises SchemaError like Quantizer.encode.
    """
    if len(ids) != len(vectors):
        raise ValueError(f"{len(ids)} ids but {len(vectors)} vectors")
    # Bits 32 to 47 of the hash. The low bits choose the shard, so they are the same for all ids of a shard.
    digits = shard_of(ids, 1 << 48) >> 32
    return np.column_stack([quantizer.encode(vectors), digits.astype(np.uint16)])


def _checked(vectors: np.ndarray | Sequence[np.ndarray], dim: int | None = None) -> np.ndarray:
    """Vectors as contiguous float32 [n, d]; with `dim` None, for training: at least one, of any d."""
    if dim is None and len(vectors) == 0:
        raise SchemaError("semantic ids: there are no vectors to train on. Run `encode` first, or turn them off.")
    expected = (dim,) if dim else np.shape(vectors[0])
    table = isinstance(vectors, np.ndarray) and vectors.shape[1:] == expected
    odd = None if table else next((row for row, v in enumerate(vectors) if np.shape(v) != expected), None)
    if odd is not None or len(expected) != 1 or expected[0] == 0:
        raise SchemaError(
            f"semantic ids, row {odd or 0}: the vector's shape is {np.shape(vectors[odd or 0])}, but must be "
            f"{expected if odd is not None else '(d,)'}. Use vectors of one encoder."
        )
    checked = np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1, expected[0])
    with np.errstate(over="ignore", invalid="ignore"):
        bad = np.flatnonzero(~np.isfinite(np.einsum("nd,nd->n", checked, checked)))
    if len(bad):
        raise SchemaError(
            f"semantic ids, row {bad[0]}: the vector is not finite, or too large to square in float32 "
            f"({len(bad)} such rows). Drop it with its id, and check the encoder's input."
        )
    return checked


def _train(vectors: np.ndarray, config: SemanticIdConfig, seed: int) -> tuple[np.ndarray, ...]:
    import faiss

    codes = min(config.codes_per_level, len(np.unique(vectors, axis=0)))
    bits = max(1, codes.bit_length() - 1)
    if len(vectors) == 1:
        vectors = np.repeat(vectors, 2, axis=0)  # a level has at least two codes, and k-means needs a vector for each
    quantizer = _residual_quantizer(vectors.shape[1], bits, config.levels, seed)
    quantizer.train(vectors)
    books = faiss.vector_to_array(quantizer.codebooks).reshape(config.levels, 1 << bits, -1)
    return tuple(np.array(book, dtype=np.float32) for book in books)


def _residual_quantizer(dim: int, bits: int, levels: int, seed: int = SEED) -> "faiss.ResidualQuantizer":
    import faiss

    quantizer = faiss.ResidualQuantizer(dim, levels, bits)
    quantizer.max_beam_size = _BEAM
    # faiss's default first clusters in few dimensions, and fits a level to the whole beam, most of which is dropped. Of
    # 512 clusters planted as 8 x 8 x 8 it separates 15; plain k-means on the best of the beam separates all.
    quantizer.train_type = faiss.ResidualQuantizer.Train_default | faiss.ResidualQuantizer.Train_top_beam
    parameters = quantizer.cp
    parameters.niter = _ITERATIONS
    parameters.seed = seed
    parameters.min_points_per_centroid = 1  # no warning about fewer vectors than faiss likes
    # k-means++: with uniform starting points, two of eight clear clusters often end in one code.
    parameters.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    return quantizer


def _slices(n: int) -> Iterator[slice]:
    return (slice(start, start + _CODED_AT_ONCE) for start in range(0, n, _CODED_AT_ONCE))


# --------------------------------------------------------------------------------------------------------- code quality
# Quality of semantic ids for their vectors: uniqueness, usage of codes, loss of information.


class QuantizationReport(Config):
    """Figures of one quantizer on some vectors."""

    vectors: int  # sample size; with more vectors, fewer ids are unique
    unique_rate: float  # distinct ids per vector, without the duplicate digit; TorchEasyRec recommends more than .7
    unique_rate_with_digit: float  # 1: all are distinct
    code_usage: tuple[float, ...]  # per level: share of its codes in use
    relative_error: float  # mean squared error / the vectors' mean square: 0 is exact, 1 no better than zeros
    bytes_per_entity: float  # the codes and the digit, packed as in a release

    @property
    def mean_code_usage(self) -> float:
        """Share of codes in use, averaged over levels."""
        return sum(self.code_usage) / len(self.code_usage)

    def counts(self) -> dict[str, float]:
        """Counts for a stage's manifest."""
        return {
            "ids_unique_rate": self.unique_rate,
            "ids_unique_rate_with_digit": self.unique_rate_with_digit,
            "ids_code_usage": self.mean_code_usage,
            "ids_relative_error": self.relative_error,
        }


def measure_codes(quantizer: "Quantizer", codes: np.ndarray, vectors: np.ndarray) -> QuantizationReport:
    """Measures semantic ids on a sample of vectors.

    codes: uint16 [n, levels + 1], the duplicate digit last; vectors: float [n, d], aligned; n >= 1.
    """
    levels, sizes = codes[:, :-1], quantizer.sizes
    error = energy = 0.0
    for start in range(0, len(codes), _CODED_AT_ONCE):
        exact = np.asarray(vectors[start : start + _CODED_AT_ONCE], dtype=np.float64)
        error += float(np.square(exact - quantizer.decode(levels[start : start + _CODED_AT_ONCE])).sum())
        energy += float(np.square(exact).sum())
    return QuantizationReport(
        vectors=len(codes),
        unique_rate=len(np.unique(levels, axis=0)) / len(codes),
        unique_rate_with_digit=len(np.unique(codes, axis=0)) / len(codes),
        code_usage=tuple(len(np.unique(column)) / size for column, size in zip(levels.T, sizes, strict=True)),
        relative_error=error / max(energy, float(np.finfo(np.float64).tiny)),
        bytes_per_entity=packed_bytes(codes[:, -1].tolist(), sizes) / len(codes),
    )
