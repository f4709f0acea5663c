"""Training speed of the CTR models beside fuxictr 2.3.10, with knowledge beside without, and by the size of an id
table.

Data: MovieLens-100K's training samples, repeated to 10^6 rows; batch 4,096, embeddings of 32, MLP 200-80, three cross
layers, DIN's attention 32-16 with softmax, Adam. Knowledge: random vectors of 384 components without any common
direction, so the adaptor, at KAR's width, reads nearly all of them: the slowest case of `ctr.knowledge_variance`. Each
measurement is one epoch in a process of its own, all with the same threads and allocator. Both sides read target,
history, genres and year in seven fields: the seventh of ours is the mean of the history's ratings, that of the peer,
whose loader has no such thing, the last rating. The peer's DCNv2 and DIN are those of its wheel (model_zoo.LongCTR);
its DeepFM is not in the wheel and is put together from its layers. It is timed twice: as it trains (its `train_epoch`,
its loader, in its process or one beside it, whichever is faster), and with batches that lie ready in memory, as no
trainer has them.

The peer is looked for on PYTHONPATH:
    pip install --no-deps --target /some/folder fuxictr==2.3.10 keras_preprocessing h5py polars polars-runtime-32 six
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import Figure, options_parser, show

ROWS, QUICK_ROWS, BATCH = 1_000_000, 65_536, 4096
BACKBONES = ("dcnv2", "deepfm", "din")
OURS, KNOWLEDGE, PEER, READY = "owlrec", "owlrec, with knowledge", "fuxictr 2.3.10", "fuxictr, batches ready"
HALF, HALF_KNOWLEDGE = f"{OURS}, bfloat16", f"{KNOWLEDGE}, bfloat16"
BASES = {KNOWLEDGE: OURS, HALF_KNOWLEDGE: HALF}
TABLES = (100_000, 10_000_000)
KNOWLEDGE_DIM = 384  # MiniLM's
HISTORY = 10


def main() -> None:
    """Runs what is asked for; each measurement in a fresh process."""
    parser = options_parser(__doc__)
    parser.add_argument("--only", choices=("peers", "tables"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=BACKBONES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_work(json.loads(options.worker))))
        return
    rounds = options.rounds or (1 if options.quick else 3)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "tables":
            rows = options.rows or (QUICK_ROWS if options.quick else ROWS)
            figures += _beside_peers(folder, rows, rounds, options.backbones)
        if options.only != "peers":
            figures += _tables(12 if options.quick else 60, rounds)
    show("training speed of CTR models", figures, options)


def _in_process(**task: Any) -> Any:
    command = [sys.executable, "-m", "benchmarks.ctr_speed", "--worker", json.dumps(task)]
    kept = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **kept})
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _beside_peers(folder: str, rows: int, rounds: int, backbones: Sequence[str]) -> list[Figure]:
    methods = [OURS, KNOWLEDGE, HALF, HALF_KNOWLEDGE]
    if find_spec("fuxictr") and find_spec("model_zoo"):
        methods += [PEER, READY]
    else:
        print(f"skipped: {PEER}, which is not on PYTHONPATH", file=sys.stderr)
    _in_process(method="prepare", folder=folder)
    figures = []
    for backbone in backbones:
        speeds: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(rounds):
            for method, rates in speeds.items():
                loaders = (0, 1) if method == PEER else (0,)
                runs = [
                    _in_process(method=method, backbone=backbone, folder=folder, rows=rows, beside=b) for b in loaders
                ]
                rates.append(max(runs))
                print(f"{backbone}: {method} {rates[-1]:,.0f} samples/s", file=sys.stderr, flush=True)
        medians = {method: float(np.median(rates)) for method, rates in speeds.items()}
        for method, median in medians.items():
            half = (max(speeds[method]) - min(speeds[method])) / 2 / median
            spread = f" (±{half:.0%})" if len(speeds[method]) > 1 else ""  # of one round there is none
            peers = (
                [p for p in (PEER, READY) if p in medians] if method == OURS else [*filter(None, [BASES.get(method)])]
            )
            for peer in peers or [None]:
                figures.append(
                    Figure(
                        measure=f"{backbone}, {rows:,} rows, batch {BATCH:,}",
                        method=method,
                        value=round(median),
                        unit=f"samples/s{spread}",
                        ratio_to=peer,
                        ratio=median / medians[peer] if peer else None,
                    )
                )
    return figures


def _tables(steps: int, rounds: int) -> list[Figure]:
    times: dict[int, list[float]] = {n: [] for n in TABLES}
    touched = {}
    for _ in range(rounds):
        for n, durations in times.items():
            result = _in_process(method="table", items=n, steps=steps)
            durations.append(result["ms"])
            touched[n] = result["rows"]
            print(f"table of {n:,} x 32: {durations[-1]:.1f} ms a step", file=sys.stderr, flush=True)
    first = float(np.median(times[TABLES[0]]))
    return [
        Figure(
            measure=f"a step on a table of {n:,} x 32, {touched[n]:,} rows of it in the gradient",
            method=OURS,
            value=round(float(np.median(durations)), 1),
            unit="ms",
            ratio_to=f"{TABLES[0]:,} rows",
            ratio=float(np.median(durations)) / first,
        )
        for n, durations in times.items()
    ]


def _work(task: dict[str, Any]) -> Any:
    """One measurement, in its own process."""
    if task["method"] == "prepare":
        return _prepare(Path(task["folder"]))
    if task["method"] == "table":
        return _table_step(task["items"], task["steps"])
    if task["method"] in (OURS, KNOWLEDGE, HALF, HALF_KNOWLEDGE):
        return _ours(task)
    return _peer(task)


def _prepare(folder: Path) -> None:
    """MovieLens-100K's features, and the same rows in the peer's format."""
    import pandas as pd

    features = _movielens()
    train, items = features.splits["train"].whole(), features.items
    pd.DataFrame(
        {
            "item_index": np.arange(len(items.codes)),
            "item_id": items.codes,
            **{field.column: list(items.attributes[:, i]) for i, field in enumerate(features.spec.fields.items)},
        }
    ).to_parquet(folder / "items.parquet")
    lengths = (train.history != 0).sum(1)
    histories = [row[:n] for row, n in zip(train.history, lengths, strict=True)]
    pd.DataFrame({"full_item_seq": histories}).to_parquet(folder / "users.parquet")


def _movielens() -> Any:
    from benchmarks.samples import RATED
    from owlrec.ctr.features import build_features
    from owlrec.sources.datasets import MovieLens100KSource
    from owlrec.sources.splits import SplitConfig, build_samples

    raw = MovieLens100KSource(type="movielens-100k").load()
    split = SplitConfig(history_length=HISTORY, cuts=("kar",))
    samples = build_samples(raw.interactions, split, RATED).samples
    return build_features(
        raw.users, raw.items, samples, features={"items": ("genres", "year"), "users": ()}, min_item_count=2
    )  # fmt: skip


def _repeated(n_train: int, rows: int) -> np.ndarray:
    return np.resize(np.arange(n_train), rows)


def _ours(task: dict[str, Any]) -> float:
    from dataclasses import replace

    from owlrec.ctr.dataset import reduced
    from owlrec.ctr.experiment import CTRConfig, Trial
    from owlrec.ctr.features import Split
    from owlrec.ctr.knowledge_tables import KnowledgeTable
    from owlrec.ctr.trainer import TrainingData, train_one

    features = _movielens()
    train = features.splits["train"].whole()
    repeated = Split.of(train.take(_repeated(len(train), task["rows"])))
    rng = np.random.default_rng(0)
    kind_tables = {}
    for kind, ids in (("user", np.unique(np.concatenate([s.whole().user_ids for s in features.splits.values()]))),
                      ("item", features.items.ids)):  # fmt: skip
        kind_tables[kind] = KnowledgeTable(ids, rng.normal(size=(len(ids), KNOWLEDGE_DIM)).astype(np.float16))
    half = task["method"] in (HALF, HALF_KNOWLEDGE)
    config = CTRConfig(batch_size=BATCH, epochs=1, precision="bfloat16" if half else "float32")
    kind_tables = reduced(kind_tables, config.knowledge_variance)  # as `train_ctr` does, once a grid
    data = TrainingData(replace(features, splits={**features.splits, "train": repeated}), {"knowledge": kind_tables})
    arm: Any = "knowledge" if task["method"] in BASES else "none"
    trial = Trial(backbone=task["backbone"], arm=arm, seed=0)
    return train_one(trial, data, config).result.samples_per_s


def _peer(task: dict[str, Any]) -> float:
    """Its own train_epoch: forward, backward, clipping, Adam, and the loss read at each step."""
    import pandas as pd
    from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader

    folder, rows = Path(task["folder"]), task["rows"]
    features = _movielens()
    train = features.splits["train"].whole()
    order, lengths = _repeated(len(train), rows), (train.history != 0).sum(1)
    data = folder / f"train-{rows}.parquet"
    pd.DataFrame(
        {
            "user_index": order,
            "item_index": train.items[order],
            "seq_len": lengths[order],
            "rating": train.ratings[np.arange(len(train)), np.maximum(lengths - 1, 0)][order],
            "label": train.labels[order].astype(np.int64),  # a float would make the loader read all columns as floats
        }
    ).to_parquet(data)
    feature_map = _feature_map(features)
    loader: Any = LongCTRDataLoader(
        feature_map, str(data), str(folder / "users.parquet"), str(folder / "items.parquet"),
        batch_size=BATCH, shuffle=True, num_workers=task["beside"], max_len=HISTORY, padding="post",
    )  # fmt: skip
    model = _peer_model(task["backbone"], feature_map, str(folder))
    if task["method"] == READY:
        some = [batch for batch, _ in zip(loader, range(8), strict=False)]
        loader = [some[i % len(some)] for i in range(-(-rows // BATCH))]
    model._eval_steps, model._max_gradient_norm, model._total_steps = 10**9, 10.0, 0
    model._stop_training, model._epoch_index = False, 0
    started = time.perf_counter()
    model.train_epoch(loader)
    return rows / (time.perf_counter() - started)


def _feature_map(features: Any) -> Any:
    from fuxictr.features import FeatureMap

    feature_map = FeatureMap("movielens", "")
    spec = features.spec
    feature_map.features.update(
        {name: {"type": "meta", "source": ""} for name in ("user_index", "item_index", "seq_len")}
    )
    feature_map.features["rating"] = {"type": "categorical", "source": "user", "vocab_size": 11, "padding_idx": 0}
    feature_map.features["item_id"] = {
        "type": "categorical", "source": "item", "vocab_size": spec.n_items, "padding_idx": 0,
    }  # fmt: skip
    for field in spec.fields.items:
        size, most = spec.tables[field.table], max(other.width for other in spec.fields.items)
        feature_map.features[field.column] = {
            "type": "sequence", "source": "item", "vocab_size": size, "padding_idx": 0, "max_len": most,
            "feature_encoder": "layers.MaskedAveragePooling()",
        }  # fmt: skip
    feature_map.labels, feature_map.default_emb_dim = ["label"], 32
    feature_map.num_fields = feature_map.get_num_fields()
    return feature_map


def _peer_model(backbone: str, feature_map: Any, folder: str) -> Any:
    import torch
    from fuxictr.pytorch.layers import InnerProductInteraction, MLP_Block
    from model_zoo.LongCTR.DCNv2.DCNv2 import DCNv2
    from model_zoo.LongCTR.DIN.DIN import DIN

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "embedding_dim": 32, "learning_rate": 2e-3, "optimizer": "adam", "loss": "binary_crossentropy", "verbose": 0,
        "model_root": folder, "metrics": ["AUC"], "gpu": -1,
    }  # fmt: skip
    if backbone == "din":
        return DIN(
            feature_map, dnn_hidden_units=[200, 80], attention_hidden_units=[32, 16],
            attention_hidden_activations="ReLU", din_use_softmax=True, **settings,
        )  # fmt: skip
    if backbone == "dcnv2":
        return DCNv2(feature_map, parallel_dnn_hidden_units=[200, 80], num_cross_layers=3, **settings)

    class DeepFM(DCNv2):  # type: ignore[misc]
        """Inputs, embeddings and pooling of its DCNv2; a linear term, its inner product and its MLP after them."""

        def __init__(self) -> None:
            super().__init__(feature_map, parallel_dnn_hidden_units=[200, 80], **settings)
            del self.crossnet, self.parallel_dnn, self.fc
            width = feature_map.sum_emb_out_dim() + self.item_info_dim
            self.linear, self.pairs = torch.nn.Linear(width, 1), InnerProductInteraction(width // 32)
            self.deep = MLP_Block(input_dim=width, output_dim=1, hidden_units=[200, 80])
            self.compile("adam", "binary_crossentropy", 2e-3)

        def forward(self, inputs: Any) -> dict[str, Any]:
            single, items, mask = self.get_inputs(inputs)
            embedded = self.embedding_layer(items, flatten_emb=True).view(mask.shape[0], -1, self.item_info_dim)
            pooled = self.masked_avg_pooling(embedded[:, :-1], mask)
            flat = torch.cat([self.embedding_layer(single, flatten_emb=True), embedded[:, -1], pooled], dim=1)
            logits = self.linear(flat) + self.pairs(flat.view(len(flat), -1, 32)) + self.deep(flat)
            return {"y_pred": self.output_activation(logits)}

    return DeepFM()


def _table_step(n_items: int, steps: int) -> dict[str, float]:
    """Items drawn uniformly: the worst case for caches, about 45,000 distinct rows a step."""
    import torch

    from owlrec.ctr.batches import SplitTensors
    from owlrec.ctr.experiment import CTRConfig
    from owlrec.ctr.features import RESERVED, FeatureSchema, FeatureSpec, Histories, ItemFeatures, SampleFeatures
    from owlrec.ctr.model import CTRModel, ModelSpec
    from owlrec.ctr.trainer import Optimizers

    rng = np.random.default_rng(0)
    codes = np.arange(n_items + RESERVED, dtype=np.int32)
    items = ItemFeatures(np.arange(n_items), codes, np.zeros((n_items + RESERVED, 0, 1), np.int32),
                         np.zeros((n_items + RESERVED, 0), np.float32))  # fmt: skip
    spec = FeatureSpec(n_items=n_items + RESERVED, tables={}, fields=FeatureSchema(), history_length=HISTORY)
    n = steps * BATCH
    split = SplitTensors(
        SampleFeatures(
            user_ids=np.zeros(n, np.int64), item_ids=np.zeros(n, np.int64),
            items=rng.integers(RESERVED, n_items, n, np.int32),
            histories=Histories(
                np.arange(n) * HISTORY, np.full(n, HISTORY, np.int32),
                rng.integers(RESERVED, n_items, n * HISTORY, np.int32), np.ones(n * HISTORY, np.uint8), HISTORY,
            ),
            fields=np.zeros((n, 0, 1), np.int32), numbers=np.zeros((n, 0), np.float32),
            labels=rng.integers(0, 2, n).astype(np.float32),
        ),
        None, "cpu",
    )  # fmt: skip
    config = CTRConfig(batch_size=BATCH)
    model = CTRModel(ModelSpec.of(spec, "dcnv2", 0, config), items)
    optimizers = Optimizers(model, config)
    times, labels = [], torch.from_numpy(split.samples.labels)
    for rows in torch.arange(n).split(BATCH):
        started = time.perf_counter()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(split.batch(rows)), labels[rows])
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        times.append(time.perf_counter() - started)
    gradient = model.item.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    return {"ms": 1e3 * float(np.median(times[2:])), "rows": len(gradient.coalesce().values())}


if __name__ == "__main__":
    main()
