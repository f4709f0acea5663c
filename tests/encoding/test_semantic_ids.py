"""Planted clusters come back as codes, errors fall, digits tell duplicates apart, and bad input is named."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from owlrec.encoding import compression
from owlrec.encoding.compression import (
    QuantizationReport,
    Quantizer,
    SemanticIdConfig,
    code_vectors,
    measure_codes,
    train_quantizer,
)
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.ids import shard_of
from owlrec.workspace import Workspace


def small(**changes: int) -> SemanticIdConfig:
    return SemanticIdConfig(**{"codes_per_level": 16, **changes})


def measured(quantizer: Quantizer, vectors: np.ndarray, ids: np.ndarray) -> QuantizationReport:
    return measure_codes(quantizer, code_vectors(quantizer, ids, vectors), vectors)


def gaussian(n: int, d: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def planted() -> tuple[np.ndarray, np.ndarray]:
    """8 coarse places, 8 finer ones around each, 8 still finer around those; with noise. Vectors and their places."""
    levels = [100 * gaussian(8, seed=1), gaussian(8, seed=2), 0.01 * gaussian(8, seed=3)]
    places = np.array(list(product(range(8), repeat=3)) * 2)
    centers = sum(level[places[:, i]] for i, level in enumerate(levels))
    return (centers + 1e-5 * gaussian(len(places), seed=4)).astype(np.float32), places


def pairs(*columns: np.ndarray) -> int:
    return len(np.unique(np.column_stack(columns), axis=0))


class TestQuantizer:
    def test_planted_clusters_come_back_as_prefixes(self) -> None:
        vectors, places = planted()
        codes = train_quantizer(vectors, small(codes_per_level=8)).encode(vectors)
        assert codes.dtype == np.uint16
        # As many combinations as there are places: each coarse place has a first code of its own, and the other way.
        assert len(np.unique(codes[:, 0])) == pairs(codes[:, 0], places[:, 0]) == 8
        assert pairs(codes[:, :2]) == pairs(codes[:, :2], places[:, :2]) == 64
        assert pairs(codes) == pairs(codes, places) == 512

    def test_error_falls_with_levels(self) -> None:
        vectors, ids = gaussian(600), np.arange(600)
        errors = [
            measured(train_quantizer(vectors, small(levels=n)), vectors, ids).relative_error for n in (1, 2, 3, 4)
        ]
        assert all(after < before for before, after in zip([1.0, *errors], errors, strict=False))

    def test_each_code_takes_something_off_the_error(self) -> None:
        vectors = gaussian(600)
        quantizer = train_quantizer(vectors, small())
        codes = quantizer.encode(vectors)
        partial = np.zeros_like(vectors)
        errors = [float(np.square(vectors).mean())]
        for level, book in enumerate(quantizer.codebooks):
            partial += book[codes[:, level]]
            errors.append(float(np.square(vectors - partial).mean()))
        assert errors == sorted(errors, reverse=True)
        np.testing.assert_allclose(quantizer.decode(codes), partial, atol=1e-6)

    def test_decoded_vectors_code_to_themselves(self) -> None:
        vectors, _ = planted()
        quantizer = train_quantizer(vectors, small(codes_per_level=8))
        codes = quantizer.encode(vectors)
        np.testing.assert_array_equal(quantizer.encode(quantizer.decode(codes)), codes)

    def test_same_seed_same_codes(self) -> None:
        vectors = gaussian(800)
        first, second = (train_quantizer(vectors, small(), sample=300) for _ in range(2))
        for a, b in zip(first.codebooks, second.codebooks, strict=True):
            np.testing.assert_array_equal(a, b)
        other = train_quantizer(vectors, small(), sample=300, seed=1)
        assert not np.array_equal(first.codebooks[0], other.codebooks[0])

    def test_many_rows_code_as_each_alone(self) -> None:
        vectors = gaussian(9000)  # more than are coded at once
        quantizer = train_quantizer(vectors, small(codes_per_level=4, levels=2))
        codes = quantizer.encode(vectors)
        for row in (0, 8191, 8192, 8999):
            np.testing.assert_array_equal(quantizer.encode(vectors[row : row + 1])[0], codes[row])

    def test_reloaded_quantizer_codes_the_same(self, workspace: Workspace) -> None:
        vectors = gaussian(200)
        quantizer = train_quantizer(vectors, small())
        quantizer.save(workspace, "semantic_ids/item")
        loaded = Quantizer.load(workspace, "semantic_ids/item")
        assert (loaded.config, loaded.fingerprint) == (quantizer.config, quantizer.fingerprint)
        train_quantizer(gaussian(200, seed=3), small()).save(workspace, "semantic_ids/item")
        assert (
            Quantizer.load(workspace, "semantic_ids/item").fingerprint == quantizer.fingerprint
        )  # the first one stays
        np.testing.assert_array_equal(loaded.encode(gaussian(50, seed=9)), quantizer.encode(gaussian(50, seed=9)))
        np.testing.assert_array_equal(loaded.decode(loaded.encode(vectors)), quantizer.decode(loaded.encode(vectors)))

    @pytest.mark.parametrize("n", [1, 2, 3, 5, 17])
    def test_few_vectors_give_few_codes(self, n: int) -> None:
        vectors = gaussian(n)
        quantizer = train_quantizer(vectors, SemanticIdConfig())
        assert all(len(book) <= max(2, n) for book in quantizer.codebooks)
        report = measured(quantizer, vectors, np.arange(n))
        assert report.relative_error < (1e-10 if n in (1, 2) else 0.5)

    @settings(max_examples=25)
    @given(data=st.data())
    def test_any_finite_vectors_can_be_coded(self, data: st.DataObject) -> None:
        n, d = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
        values = st.sampled_from([0.0, 1.0, -1.0, 1e-20, 3.5, 1e4])
        vectors = np.array([[data.draw(values) for _ in range(d)] for _ in range(n)], dtype=np.float32)
        quantizer = train_quantizer(vectors, small(codes_per_level=8))
        report = measured(quantizer, vectors, np.arange(n))
        assert (
            report.unique_rate_with_digit > 0.95
        )  # of at most 40 ids two share codes and digit once in a hundred runs
        assert np.isfinite(report.relative_error)


def test_beam_search_codes_at_least_as_well_as_the_nearest_code(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids = gaussian(1000), np.arange(1000)
    errors = {}
    for beam in (1, 8):
        monkeypatch.setattr(compression, "_BEAM", beam)
        errors[beam] = measured(train_quantizer(vectors, small()), vectors, ids).relative_error
    assert errors[8] < errors[1]


def test_quantizer_counts_its_worth() -> None:
    config = SemanticIdConfig(levels=2, codes_per_level=4)
    book = np.array([[0, 0], [4, 0], [0, 4], [4, 4]], dtype=np.float32)
    quantizer = Quantizer(config, (book, book / 4))
    # (4, 0) twice; (5, 1) is (4, 0) + (1, 1); (0, 5) is (0, 4) + (0, 1); (0, 3.5) is half a step from (0, 4) + 0.
    vectors = np.array([[4, 0], [4, 0], [5, 1], [0, 5], [0, 3.5]], dtype=np.float32)
    np.testing.assert_array_equal(quantizer.encode(vectors), [[1, 0], [1, 0], [1, 3], [2, 2], [2, 0]])
    report = measured(quantizer, vectors, np.array([9, 3, 5, 6, 7]))
    assert report.vectors == 5
    assert report.unique_rate == 4 / 5
    assert report.unique_rate_with_digit == 1
    assert report.code_usage == (2 / 4, 3 / 4)
    assert report.relative_error == pytest.approx(0.25 / (16 + 16 + 26 + 25 + 12.25))
    assert report.mean_code_usage == 5 / 8
    assert report.bytes_per_entity == 4  # a byte per level and two of the digit


def test_float16_vectors_are_taken() -> None:
    vectors = gaussian(50).astype(np.float16)
    assert train_quantizer(vectors, small()).encode(vectors).shape == (50, 3)


def test_nothing_to_code_is_no_error() -> None:
    quantizer = train_quantizer(gaussian(20), small())
    assert quantizer.encode(np.zeros((0, 12), np.float32)).shape == (0, 3)
    assert quantizer.decode(np.zeros((0, 3), np.uint16)).shape == (0, 12)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(SchemaError, match="no vectors to train on"):
        train_quantizer(np.zeros((0, 8), np.float32), SemanticIdConfig())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_vector_that_is_not_finite_is_named(value: float) -> None:
    vectors = gaussian(10)
    quantizer = train_quantizer(vectors, small())
    vectors[7, 2] = value
    for use in (quantizer.encode, lambda v: train_quantizer(v, small())):
        with pytest.raises(SchemaError, match="row 7: the vector is not finite"):
            use(vectors)


def test_vectors_of_several_sizes_are_refused() -> None:
    with pytest.raises(SchemaError, match=r"row 2: the vector's shape is \(6,\), but must be \(8,\)"):
        train_quantizer([*gaussian(2, 8), *gaussian(1, 6)], SemanticIdConfig())
    quantizer = train_quantizer(gaussian(20), small())
    with pytest.raises(SchemaError, match=r"row 0: the vector's shape is \(6,\), but must be \(12,\)"):
        quantizer.encode(gaussian(3, 6))


@pytest.mark.parametrize("vectors", [np.ones(5, np.float32), np.ones((5, 0), np.float32), np.ones((5, 2, 2))])
def test_arrays_that_are_no_table_are_refused(vectors: np.ndarray) -> None:
    with pytest.raises(SchemaError, match="row 0: the vector's shape"):
        train_quantizer(vectors, SemanticIdConfig())


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((4, 4), np.uint16), r"codes have shape \[4, 4\], but this quantizer's have \[n, 3\]"),
        (np.zeros(3, np.uint16), r"\[3\]"),
        (np.array([[0, 0, 0], [0, 16, 0]]), "row 1: code 16 is out of range: level 1 has 16 codes"),
        (np.array([[-1, 0, 0]]), "row 0: code -1 is out of range: level 0"),
    ],
)
def test_codes_of_another_quantizer_are_refused(codes: np.ndarray, message: str) -> None:
    quantizer = train_quantizer(gaussian(100), small())
    with pytest.raises(SchemaError, match=message):
        quantizer.decode(codes)


def test_codes_fill_whole_bits() -> None:
    with pytest.raises(ValidationError, match="codes_per_level"):
        SemanticIdConfig(codes_per_level=100)


def test_damaged_quantizer_is_refused(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="does not exist"):
        Quantizer.load(workspace, "a")
    train_quantizer(gaussian(40), small()).save(workspace, "a")
    good = workspace.read_bytes("a/codebooks.safetensors")
    for data in (good[:-4] + b"odds", good[:50], b""):
        workspace.write_bytes("a/codebooks.safetensors", data)
        with pytest.raises(WorkspaceError, match=r"codebooks\.safetensors.*`encode` again"):
            Quantizer.load(workspace, "a")


class TestDuplicateDigit:
    def test_it_follows_the_codes_and_is_the_same_wherever_the_id_is_coded(self) -> None:
        vectors = gaussian(500)
        quantizer = train_quantizer(vectors, small())
        ids = np.random.default_rng(0).integers(-(2**63), 2**63, 500)
        full = code_vectors(quantizer, ids, vectors)
        assert (full.dtype, full.shape) == (np.uint16, (500, 4))
        np.testing.assert_array_equal(full[:, :3], quantizer.encode(vectors))
        for part in (slice(0, 1), slice(100, 300)):
            np.testing.assert_array_equal(code_vectors(quantizer, ids[part], vectors[part]), full[part])
        # An id whose vector changes keeps its digit, so that a refresh needs no bookkeeping.
        np.testing.assert_array_equal(code_vectors(quantizer, ids, vectors[::-1])[:, 3], full[:, 3])

    def test_any_number_of_ids_may_share_their_codes(self) -> None:
        """Of n ids with 2^16 digits about n^2 / 2^17 pairs share one: 38 of 2,236, 38,147 of 70,711."""
        quantizer = train_quantizer(gaussian(20), small())
        for n, expected in ((2_236, 38), (70_711, 38_147)):
            digits = code_vectors(quantizer, np.arange(n) * 4, np.tile(gaussian(1), (n, 1)))[:, 3]
            counts = np.unique(digits, return_counts=True)[1].astype(int)
            assert (counts * (counts - 1) // 2).sum() == pytest.approx(expected, abs=5 * expected**0.5)

    def test_ids_of_one_shard_differ_in_it(self) -> None:
        ids = np.arange(1 << 20)
        ids = ids[shard_of(ids, 1 << 12) == 5]
        quantizer = train_quantizer(gaussian(20), small())
        digits = code_vectors(quantizer, ids, np.tile(gaussian(1), (len(ids), 1)))[:, 3]
        assert len(set(digits.tolist())) >= 0.99 * len(ids) > 200

    def test_ids_of_another_number_than_vectors_are_refused(self) -> None:
        with pytest.raises(ValueError, match="2 ids but 3 vectors"):
            code_vectors(train_quantizer(gaussian(20), small()), np.array([4, 1]), gaussian(3))
