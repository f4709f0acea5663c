"""Semantic ids: are they unique, are all codes used, what do they lose, beside other quantizers of as many bytes.

`--vectors FOLDER` judges the ids of an encoded run (vectors/<fingerprint> of its workspace): of its knowledge, or of
its metadata with `--source metadata`; vectors without ids get them here, by the defaults. Without a folder, the
metadata of MovieLens-100K is encoded first. Code usage is, of each level, the share of its codes that occur; its mean
and least are over all levels of both kinds.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from benchmarks.samples import RATED
from benchmarks.table import Figure, options_parser, show
from owlrec.encoding.compression import (
    QuantizationReport,
    Quantizer,
    SemanticIdConfig,
    code_vectors,
    measure_codes,
    train_quantizer,
)
from owlrec.encoding.vectors import CODED_KINDS, EncoderConfig, VectorShards, item_metadata, user_metadata
from owlrec.errors import SourceError
from owlrec.sources.datasets import MovieLens100KSource
from owlrec.sources.splits import ItemCatalog, SplitConfig, build_samples
from owlrec.workspace import Workspace

OURS = "owlrec (beam search)"
GREEDY = "residual k-means, level by level"
PRODUCT = "product quantization, 3 bytes"
_MOST_VECTORS = 1 << 20


@dataclass(frozen=True)
class Coded:
    """The vectors of one kind, float32 [n, d], and their semantic ids, the duplicate digit last."""

    vectors: np.ndarray
    codes: np.ndarray
    quantizer: Quantizer


def main() -> None:
    """Prints the figures of each kind, of both together, and of the peers."""
    parser = options_parser(__doc__)
    parser.add_argument("--vectors", type=Path, help="a folder that `encode` wrote")
    parser.add_argument("--source", default="knowledge", help="with --vectors: whose ids; default: %(default)s")
    options = parser.parse_args()
    coded = _run_codes(options) if options.vectors else _metadata_codes(options)
    reports = {kind: measure_codes(c.quantizer, c.codes, c.vectors) for kind, c in coded.items()}
    figures = [f for kind, report in reports.items() for f in _figures(kind, report)]
    figures += _together(coded, reports)
    for kind, c in coded.items():
        figures += _peers(kind, c.vectors, reports[kind])
    source = f"{options.source} of {options.vectors}" if options.vectors else "metadata of MovieLens-100K"
    sizes = ", ".join(f"{len(c.codes):,} {kind}s" for kind, c in coded.items())
    show(f"semantic ids of {sizes}: {source}", figures, options)


def _run_codes(options: argparse.Namespace) -> dict[str, Coded]:
    folder = options.vectors.resolve()
    workspace, coded = Workspace(folder.parent.parent), {}
    for kind in CODED_KINDS:
        shards = VectorShards(workspace, f"vectors/{folder.name}", f"{options.source}-{kind}")
        if shards.numbers:
            ids, vectors = shards.sample(_MOST_VECTORS, seed=0)
            quantizer = shards.quantizer()
            coded[kind] = (
                Coded(vectors.astype(np.float32), shards.codes(ids)[0], quantizer) if quantizer else _code(ids, vectors)
            )
    if not coded:
        raise SourceError(
            f"{options.vectors} holds no {options.source} vectors. Name a folder that `encode` wrote, or another "
            "--source."
        )
    return coded


def _metadata_codes(options: argparse.Namespace) -> dict[str, Coded]:
    most = 300 if options.quick else None
    raw = MovieLens100KSource(type="movielens-100k", max_users=most, max_items=most).load()
    split = build_samples(raw.interactions, SplitConfig(cuts=("half",)), RATED)
    texts = {
        "user": user_metadata(raw.users, ItemCatalog(raw.items), split.histories),
        "item": item_metadata(raw.items),
    }
    encoder = EncoderConfig().load()
    return {kind: _code(ids, encoder.encode(lines)) for kind, (ids, lines) in texts.items()}


def _code(ids: np.ndarray, vectors: np.ndarray) -> Coded:
    vectors = vectors.astype(np.float32)
    quantizer = train_quantizer(vectors, SemanticIdConfig())
    return Coded(vectors, code_vectors(quantizer, ids, vectors), quantizer)


def _figures(kind: str, report: QuantizationReport, method: str = OURS) -> list[Figure]:
    values = {
        "unique ids": (100 * report.unique_rate, "%"),
        "unique ids with duplicate digit": (100 * report.unique_rate_with_digit, "%"),
        "code usage, mean of levels": (100 * report.mean_code_usage, "%"),
        "code usage, least of levels": (100 * min(report.code_usage), "%"),
        "relative error": (report.relative_error, ""),
        "bytes an id": (report.bytes_per_entity, "B"),
    }
    return [
        Figure(measure=f"{kind}s: {what}", method=method, value=round(value, 4), unit=unit)
        for what, (value, unit) in values.items()
    ]


def _together(coded: dict[str, Coded], reports: dict[str, QuantizationReport]) -> list[Figure]:
    """Over all kinds: the key tells a user from an item, so a rate is the mean over their vectors."""
    weights = [r.vectors for r in reports.values()]

    def mean(name: str) -> float:
        return float(np.average([getattr(r, name) for r in reports.values()], weights=weights))

    usage = [share for report in reports.values() for share in report.code_usage]
    raw_bytes = float(np.average([2 * c.vectors.shape[1] for c in coded.values()], weights=weights))
    packed = mean("bytes_per_entity")
    values = [
        ("unique ids", 100 * mean("unique_rate"), "%"),
        ("unique ids with duplicate digit", 100 * mean("unique_rate_with_digit"), "%"),
        ("code usage, mean of levels", 100 * float(np.mean(usage)), "%"),
        ("code usage, least of levels", 100 * min(usage), "%"),
    ]
    figures = [Figure(measure=f"all: {w}", method=OURS, value=round(v, 4), unit=u) for w, v, u in values]
    return [
        *figures,
        Figure(
            measure="all: bytes an id",
            method=OURS,
            value=round(packed, 4),
            unit="B",
            ratio_to="less than float16",
            ratio=raw_bytes / packed,
        ),
    ]


def _peers(kind: str, vectors: np.ndarray, ours: QuantizationReport) -> list[Figure]:
    """Relative error and unique ids of other quantizers of 3 x 256 codes, trained on the same vectors."""
    greedy, left = _greedy(vectors)
    errors = {OURS: ours.relative_error, GREEDY: float(np.square(left).sum() / np.square(vectors).sum())}
    unique = {OURS: ours.unique_rate, GREEDY: len(np.unique(greedy, axis=0)) / len(greedy)}
    if vectors.shape[1] % 3 == 0 and len(vectors) >= 256:
        product = faiss.ProductQuantizer(vectors.shape[1], 3, 8)
        product.cp.min_points_per_centroid = 1  # no warning
        product.train(vectors)
        codes = product.compute_codes(vectors)
        errors[PRODUCT] = float(np.square(vectors - product.decode(codes)).sum() / np.square(vectors).sum())
        unique[PRODUCT] = len(np.unique(codes, axis=0)) / len(codes)
    figures = []
    for what, unit, scale, values in (("relative error", "", 1, errors), ("unique ids", "%", 100, unique)):
        for method, value in values.items():
            ratio = value / values[GREEDY] if values[GREEDY] else None
            figures.append(
                Figure(
                    measure=f"{kind}s: {what}, peers",
                    method=method,
                    value=round(scale * value, 4),
                    unit=unit,
                    ratio_to=GREEDY,
                    ratio=ratio,
                )
            )
    return figures


def _greedy(vectors: np.ndarray, levels: int = 3, codes: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """k-means of what the levels before left over, and the nearest centroid: int64 [n, levels], and what is left."""
    digits, left = [], vectors
    for _ in range(levels):
        kmeans = faiss.Kmeans(left.shape[1], min(codes, len(np.unique(left, axis=0))), niter=20, seed=0)
        kmeans.cp.min_points_per_centroid = 1
        kmeans.cp.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
        kmeans.train(left)
        digits.append(kmeans.index.search(left, 1)[1][:, 0])
        left = left - kmeans.centroids[digits[-1]]
    return np.stack(digits, axis=1), left


if __name__ == "__main__":
    main()
