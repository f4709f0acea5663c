"""Smaller forms of vectors, fitted once per set of vectors: a PCA's components, and semantic ids."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, field_validator

from owlrec.config import Config
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.schema import shard_of
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

if TYPE_CHECKING:
    import faiss


# ----------------------------------------------------------------------------------------------------------- projection
# PCA of vectors: the space in which ReLLa (WWW 2024) compares items, fitted once a set of vectors; without a centre,
# what the CTR models read of knowledge (ctr.reduction).
#
# ReLLa goes from 5,120 to 512 components. Its few-shot AUC moves by no more than .003 from 512 to 64, so the default
# is a cheaper 128. Centring matters too: the vectors of similar texts share a large common direction, which makes all
# cosines alike until it is taken out.


_VERSION = 1  # of the files that `save` writes
_ROWS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class ProjectionSettings:
    """How many components, and how many items they are fitted on. No recipe sets these."""

    components: int = 128  # at most; never more than the vectors' own or than items
    fit_items: int = 32_768  # drawn from all: with 384 dimensions the SVD then takes seconds
    seed: int = 0


PROJECTION = ProjectionSettings()


@dataclass(frozen=True, eq=False)
class Projection:
    """A centre, and orthonormal directions from it, those of most variance first."""

    centre: np.ndarray  # float32 [d]
    directions: np.ndarray  # float32 [c, d]

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """`vectors` in the fitted space, of length 1.

        vectors: float [n, d]. Returns float32 [n, c]; a row that is zero or not finite, as of an item without text,
        becomes zeros. Raises SchemaError where d is not the fitted one.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self.centre):
            raise SchemaError(
                f"vectors are {vectors.shape}, but the projection was fitted on [n, {len(self.centre)}]. Fit it "
                "again on these vectors, or encode the texts with the model it was fitted for."
            )
        projected = np.zeros((len(vectors), len(self.directions)), dtype=np.float32)
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            block = np.asarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
            usable = _usable(block)
            projected[start : start + len(block)][usable] = (block[usable] - self.centre) @ self.directions.T
        return unit_rows(projected)

    def save(self, workspace: Workspace, folder: str, fingerprint: str) -> None:
        """Writes projection.safetensors into `folder` and then projection.json, without which it does not count.

        fingerprint: of what the item vectors depend on; `load` refuses another.
        """
        from safetensors.numpy import save  # here: retrieving needs neither this nor what brings it

        data = save({"centre": self.centre, "directions": np.ascontiguousarray(self.directions)})
        about = {"version": _VERSION, "fingerprint": fingerprint, "sha256": hashlib.sha256(data).hexdigest()}
        workspace.write_bytes(f"{folder}/projection.safetensors", data)
        workspace.write_json(f"{folder}/projection.json", about)

    @classmethod
    def load(cls, workspace: Workspace, folder: str, fingerprint: str) -> "Projection":
        """What `save` wrote. Raises WorkspaceError where it is missing or damaged, or was fitted on other vectors."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        where = workspace.path(folder, "projection.json")
        about = workspace.read_json(f"{folder}/projection.json")
        data = workspace.read_bytes(f"{folder}/projection.safetensors")
        try:
            if about["version"] != _VERSION or about["fingerprint"] != fingerprint:
                raise WorkspaceError(
                    f"{where} is of version {about['version']} and of the item vectors {about['fingerprint'][:8]}, but "
                    f"version {_VERSION} and {fingerprint[:8]} are wanted. Fit the projection again."
                )
            if about["sha256"] != hashlib.sha256(data).hexdigest():
                raise ValueError("other bytes than were written")
            arrays = load(data)
            return cls(arrays["centre"], arrays["directions"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise WorkspaceError(
                f"{where}: the projection is damaged ({error!r}). Delete the folder and fit it again."
            ) from None


def fit_projection(
    vectors: np.ndarray, settings: ProjectionSettings = PROJECTION, *, centred: bool = True
) -> Projection:
    """The principal directions of vectors: an SVD of a seeded sample of those that are neither zero nor infinite.

    vectors: float [n, d]. centred: False takes the origin for the centre, so that a vector keeps what all share. Has
    min(components, d, items used) directions. Raises SchemaError where no vector is usable.
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
            f"vectors: none of {len(vectors)} can be fitted, all are zero or not finite. Encode the texts."
        )
    if len(usable) > settings.fit_items:
        drawn = np.random.default_rng(settings.seed).choice(usable, settings.fit_items, replace=False)
        usable = np.sort(drawn)
    sample = np.asarray(vectors[usable], dtype=np.float64)
    centre = sample.mean(axis=0) if centred else np.zeros(sample.shape[1])
    # Of the covariance: the same directions as of the data, at a fraction of the cost.
    _, _, directions = np.linalg.svd((sample - centre).T @ (sample - centre), hermitian=True)
    kept = min(settings.components, len(sample))
    return Projection(centre.astype(np.float32), directions[:kept].astype(np.float32))


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
    """bool [n]: which rows are finite and not zero."""
    return np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)


# --------------------------------------------------------------------------------------------------------- semantic ids
# Vectors -> semantic ids: a few small codes a vector, coarse to fine, by residual quantisation.
#
# Each level codes what the levels before it left over, so vectors with a common prefix are alike (TIGER, NeurIPS 2023,
# sec. 3.1; AutoGraph, KDD 2025, codes LLM knowledge so, with 3 levels of 256). The codebooks are k-means', not an
# RQ-VAE's: that gains little in the comparisons we know, and is less stable to train. Three codes of 8 bits stand for a
# vector of kilobytes: in a store, as a categorical feature, or to choose a retrieval pool.


# --------------------------------------------------------------------------------------------------------- packed codes
# Semantic ids as bytes: one a level (two where it has more than 256 codes), then the duplicate digit, if it is not 0.
#
# The digit takes as few bytes as it needs, and none for 0, so that an id of 3 x 256 codes is 3 bytes, or 4 where
# others share its codes. Bytes sort as the codes do: what begins alike is alike.


_ONE_BYTE = 1 << 8


def pack_codes(codes: np.ndarray, sizes: Sequence[int]) -> list[bytes]:
    """The bytes of semantic ids: integers [n, levels + 1], the digit last; sizes: how many codes each level has.

    Raises SchemaError for another number of levels, and for a code that its level does not have.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] != len(sizes) + 1:
        raise SchemaError(
            f"semantic ids: they are {list(codes.shape)}, but [n, {len(sizes) + 1}] is meant: {len(sizes)} codes and "
            "the duplicate digit. Code the vectors with the quantiser of the release."
        )
    check_codes(codes[:, :-1], sizes, "Code the vectors with the quantiser of the release.")
    columns = [codes[:, level : level + 1].astype(f">u{_width(size)}") for level, size in enumerate(sizes)]
    heads = np.concatenate([np.ascontiguousarray(column).view(np.uint8) for column in columns], axis=1)
    return [head.tobytes() + _digit_bytes(digit) for head, digit in zip(heads, codes[:, -1].tolist(), strict=True)]


def check_codes(codes: np.ndarray, sizes: Sequence[int], remedy: str) -> None:
    """Raises SchemaError, which ends in the remedy, for a code [n, levels] that its level does not have."""
    bad = np.argwhere((codes < 0) | (codes >= np.array(sizes)))
    if len(bad):
        row, level = bad[0]
        raise SchemaError(
            f"semantic ids, row {row}: code {codes[row, level]} of level {level}, which has {sizes[level]} codes. "
            f"{remedy}"
        )


def unpack_codes(value: bytes, sizes: Sequence[int]) -> tuple[int, ...]:
    """The codes and, last, the duplicate digit that `pack_codes` made a value of."""
    codes, at = [], 0
    for size in sizes:
        codes.append(int.from_bytes(value[at : at + _width(size)], "big"))
        at += _width(size)
    return (*codes, int.from_bytes(value[at:], "big"))


def packed_bytes(digits: Iterable[int], sizes: Sequence[int]) -> int:
    """How many bytes the semantic ids with these duplicate digits take."""
    return sum(len(_digit_bytes(digit)) + sum(map(_width, sizes)) for digit in digits)


def _width(size: int) -> int:
    return 1 if size <= _ONE_BYTE else 2


def _digit_bytes(digit: int) -> bytes:
    return digit.to_bytes((digit.bit_length() + 7) // 8, "big")


# --------------------------------------------------------------------------------------------------------- semantic ids


_CODED_AT_ONCE = 1 << 13  # of an encoding: the beam search then takes some 200 MB at d = 384
_FILE = "codebooks.safetensors"


TRAIN_SAMPLE = 1 << 15  # vectors that codebooks are fitted on; training takes 2 x _BEAM times their memory
SEED = 0  # of the sample and of k-means; faiss takes a negative one from the clock
_BEAM = 5  # faiss's default: lets a worse code of one level win by a better one of the next
_ITERATIONS = 20  # of k-means; more move the error by less than one seed differs from another
# What codes depend on beside SemanticIdConfig, for fingerprints.
CODING = f"faiss residual, beam {_BEAM}, {_ITERATIONS} iterations, {TRAIN_SAMPLE} vectors, seed {SEED}"


class SemanticIdConfig(Config):
    """How fine the ids are."""

    levels: int = Field(3, ge=1, le=16)
    codes_per_level: int = Field(256, ge=2, le=1 << 16)  # a power of two; a code is a uint16

    @field_validator("codes_per_level")
    @classmethod
    def _whole_bits(cls, codes: int) -> int:
        lower = 1 << (codes.bit_length() - 1)
        if codes != lower:
            raise ValueError(f"must be a power of two: {lower} or {2 * lower}")
        return codes


@dataclass(frozen=True)
class Quantiser:
    """Trained codebooks. A vector is near the sum of its codes' centroids, one a level."""

    config: SemanticIdConfig
    codebooks: tuple[np.ndarray, ...]  # float32 [k, d], one a level; k <= config.codes_per_level

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return int(self.codebooks[0].shape[1])

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many codes each level has."""
        return tuple(len(book) for book in self.codebooks)

    def encode(self, vectors: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """The codes of vectors: float [n, d] to uint16 [n, levels].

        Raises SchemaError for a vector of another dimension, or one that is not finite.
        """
        vectors = _checked(vectors, self.dim)
        codes = np.empty((len(vectors), len(self.codebooks)), dtype=np.uint16)
        for rows in _slices(len(vectors)):
            codes[rows] = self._beam_search(vectors[rows])
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The vectors that codes stand for: integers [n, levels] to float32 [n, d].

        Coding these again may give other codes, of a sum of centroids that lies as near.
        Raises SchemaError for codes of another shape, or one that its level does not have.
        """
        codes, levels = np.asarray(codes), len(self.codebooks)
        if codes.ndim != 2 or codes.shape[1] != levels:
            raise SchemaError(
                f"semantic ids: the codes are {list(codes.shape)}, but this quantiser's are [n, {levels}]. "
                "Leave the duplicate digit out, and take the quantiser that gave them."
            )
        check_codes(codes, self.sizes, "Take the quantiser that gave it.")
        vectors = np.zeros((len(codes), self.dim), dtype=np.float32)
        for level, book in enumerate(self.codebooks):
            vectors += book[codes[:, level]]
        return vectors

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the codebooks and how they are searched: what the codes of a vector depend on."""
        books = [hashlib.sha256(np.ascontiguousarray(book).tobytes()).hexdigest() for book in self.codebooks]
        return fingerprint("beam", _BEAM, self.dim, books)

    def save(self, workspace: Workspace, folder: str) -> None:
        """Writes the codebooks into a folder of the workspace unless some are there: the first to fit them wins."""
        from safetensors.numpy import save  # here, since the recipe imports this module and the base install lacks it

        books = {str(level): np.ascontiguousarray(book) for level, book in enumerate(self.codebooks)}
        about = {"config": self.config.model_dump_json(), "fingerprint": self.fingerprint}
        workspace.create_bytes(f"{folder}/{_FILE}", save(books, about))

    @classmethod
    def load(cls, workspace: Workspace, folder: str) -> "Quantiser":
        """What `save` wrote. Raises WorkspaceError where the file is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        data = workspace.read_bytes(f"{folder}/{_FILE}")
        try:
            books = load(data)
            about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            config = SemanticIdConfig.model_validate_json(about["config"])
            quantiser = cls(config, tuple(books[str(level)] for level in range(len(books))))
            if quantiser.fingerprint != about["fingerprint"]:
                raise ValueError("other codebooks than were written")
        except (SafetensorError, KeyError, ValueError) as error:
            raise WorkspaceError(
                f"{workspace.path(folder, _FILE)}: the codebooks are damaged ({error}). Delete the folder and run "
                "`encode` again."
            ) from None
        return quantiser

    def _beam_search(self, vectors: np.ndarray) -> np.ndarray:
        import faiss

        bits = len(self.codebooks[0]).bit_length() - 1
        quantiser = _residual_quantiser(self.dim, bits, len(self.codebooks))
        faiss.copy_array_to_vector(np.concatenate(self.codebooks).ravel(), quantiser.codebooks)
        quantiser.is_trained = True
        quantiser.use_beam_LUT = 1  # distances by tables of products: four times as fast, and .3 % of codes differ
        quantiser.compute_codebook_tables()  # type: ignore[attr-defined]
        return faiss.unpack_bitstrings(quantiser.compute_codes(vectors), len(self.codebooks), bits)


def train_quantiser(
    vectors: np.ndarray | Sequence[np.ndarray],
    config: SemanticIdConfig,
    *,
    sample: int = TRAIN_SAMPLE,
    seed: int = SEED,
) -> Quantiser:
    """Codebooks for vectors (float [n, d]), the same for the same seed.

    sample: of more vectors so many are drawn. Fewer distinct vectors than codes_per_level give fewer codes a level.
    Raises SchemaError where there is no vector, where they differ in size, or where one is not finite.
    """
    vectors = _checked(vectors)
    if len(vectors) > sample:
        rows = np.random.default_rng(seed).choice(len(vectors), sample, replace=False)
        vectors = vectors[np.sort(rows)]
    return Quantiser(config, _train(vectors, config, seed))


def code_vectors(quantiser: Quantiser, ids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The semantic ids of `ids`: uint16 [n, levels + 1], the codes of each vector and a last digit that tells ids with
    equal codes apart (TIGER, sec. 3.1).

    The digit is 16 bits of a hash of the id, not a count over all ids: it needs no other id, and stays the same in
    every shard and refresh. Two ids with equal codes share the digit with probability 2^-16 per pair.
    ids: int64 [n]; vectors: float [n, d], aligned. Raises SchemaError as Quantiser.encode.
    """
    if len(ids) != len(vectors):
        raise ValueError(f"{len(ids)} ids but {len(vectors)} vectors")
    # Bits 32 to 47 of the hash whose low bits choose the shard: those are the same for all ids of one.
    digits = shard_of(ids, 1 << 48) >> 32
    return np.column_stack([quantiser.encode(vectors), digits.astype(np.uint16)])


def _checked(vectors: np.ndarray | Sequence[np.ndarray], dim: int | None = None) -> np.ndarray:
    """The vectors as contiguous float32 [n, d]; where `dim` is None, to train on: at least one, of any d."""
    if dim is None and len(vectors) == 0:
        raise SchemaError("semantic ids: there are no vectors to train on. Run `encode` first, or leave ids out.")
    expected = (dim,) if dim else np.shape(vectors[0])
    table = isinstance(vectors, np.ndarray) and vectors.shape[1:] == expected
    odd = None if table else next((row for row, v in enumerate(vectors) if np.shape(v) != expected), None)
    if odd is not None or len(expected) != 1 or expected[0] == 0:
        raise SchemaError(
            f"semantic ids, row {odd or 0}: the vector's shape is {np.shape(vectors[odd or 0])}, but "
            f"{expected if odd is not None else '(d,)'} is meant. Train and code with vectors of one encoder."
        )
    checked = np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1, expected[0])
    with np.errstate(over="ignore", invalid="ignore"):
        bad = np.flatnonzero(~np.isfinite(np.einsum("nd,nd->n", checked, checked)))
    if len(bad):
        raise SchemaError(
            f"semantic ids, row {bad[0]}: the vector is not finite, or too long to be squared in float32 "
            f"({len(bad)} such rows). Drop it with its id, and look at what its encoder read."
        )
    return checked


def _train(vectors: np.ndarray, config: SemanticIdConfig, seed: int) -> tuple[np.ndarray, ...]:
    import faiss

    codes = min(config.codes_per_level, len(np.unique(vectors, axis=0)))
    bits = max(1, codes.bit_length() - 1)
    if len(vectors) == 1:
        vectors = np.repeat(vectors, 2, axis=0)  # a level has two codes at least, and k-means wants a vector for each
    quantiser = _residual_quantiser(vectors.shape[1], bits, config.levels, seed)
    quantiser.train(vectors)
    books = faiss.vector_to_array(quantiser.codebooks).reshape(config.levels, 1 << bits, -1)
    return tuple(np.array(book, dtype=np.float32) for book in books)


def _residual_quantiser(dim: int, bits: int, levels: int, seed: int = SEED) -> "faiss.ResidualQuantizer":
    import faiss

    quantiser = faiss.ResidualQuantizer(dim, levels, bits)
    quantiser.max_beam_size = _BEAM
    # faiss's default clusters in few dimensions first, and fits a level to the whole beam, most of which is dropped. Of
    # 512 clusters planted as 8 x 8 x 8 it tells 15 apart; plain k-means on the best of the beam tells all.
    quantiser.train_type = faiss.ResidualQuantizer.Train_default | faiss.ResidualQuantizer.Train_top_beam
    parameters = quantiser.cp
    parameters.niter = _ITERATIONS
    parameters.seed = seed
    parameters.min_points_per_centroid = 1  # fewer vectors than faiss likes do not call for a warning
    # k-means++: from starting points drawn evenly, two of eight clear clusters often end in one code.
    parameters.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    return quantiser


def _slices(n: int) -> Iterator[slice]:
    return (slice(start, start + _CODED_AT_ONCE) for start in range(0, n, _CODED_AT_ONCE))


# --------------------------------------------------------------------------------------------------------- code quality
# What semantic ids are worth on the vectors that they stand for: are they unique, are all codes used, what is lost.


class QuantisationReport(Config):
    """Figures of one quantiser on some vectors."""

    vectors: int  # of the sample that was measured; of more vectors fewer ids are unique
    unique_rate: float  # distinct ids per vector, without the duplicate digit; TorchEasyRec asks for more than .7
    unique_rate_with_digit: float  # 1: no two vectors share one
    code_usage: tuple[float, ...]  # of each level: the share of its codes that occur
    relative_error: float  # mean squared error by the vectors' mean square: 0 is exact, 1 no better than zeros
    bytes_per_entity: float  # the codes and the digit, packed as a release holds them

    @property
    def mean_code_usage(self) -> float:
        """The share of all codes of all levels that occur, levels counting alike."""
        return sum(self.code_usage) / len(self.code_usage)

    def counts(self) -> dict[str, float]:
        """What a stage's manifest says of it."""
        return {
            "ids_unique_rate": self.unique_rate,
            "ids_unique_rate_with_digit": self.unique_rate_with_digit,
            "ids_code_usage": self.mean_code_usage,
            "ids_relative_error": self.relative_error,
        }


def measure_codes(quantiser: "Quantiser", codes: np.ndarray, vectors: np.ndarray) -> QuantisationReport:
    """Measures semantic ids on a sample of vectors.

    codes: uint16 [n, levels + 1], the duplicate digit last; vectors: float [n, d], aligned; n >= 1.
    """
    levels, sizes = codes[:, :-1], quantiser.sizes
    error = energy = 0.0
    for start in range(0, len(codes), _CODED_AT_ONCE):
        exact = np.asarray(vectors[start : start + _CODED_AT_ONCE], dtype=np.float64)
        error += float(np.square(exact - quantiser.decode(levels[start : start + _CODED_AT_ONCE])).sum())
        energy += float(np.square(exact).sum())
    return QuantisationReport(
        vectors=len(codes),
        unique_rate=len(np.unique(levels, axis=0)) / len(codes),
        unique_rate_with_digit=len(np.unique(codes, axis=0)) / len(codes),
        code_usage=tuple(len(np.unique(column)) / size for column, size in zip(levels.T, sizes, strict=True)),
        relative_error=error / max(energy, float(np.finfo(np.float64).tiny)),
        bytes_per_entity=packed_bytes(codes[:, -1].tolist(), sizes) / len(codes),
    )
