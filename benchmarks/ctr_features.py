"""Features of all types beside fuxictr 2.3.10: test AUC on the same columns and rows, and the time of a request.

Data: a planted shop. Clicks follow a user's mood, an item's quality, genres, interests among an item's tags, the
price, the device, the position and the hour, and whether a genre was put into the cart before; 43,200 training rows.
Both sides get the same encoded columns: ids, categories, lists, a price in buckets, two logarithms, and the last ten
behaviors with their items' features, outcomes and events, as means. The peer's model is put together from its
FeatureEmbedding, CrossNetV2 and MLP_Block, and trained by its `train_epoch`; the same widths, batch, learning rate,
Adam and early stopping on valid. Three seeds.

A request scores 200 candidates of a user with a history, by the exported model's path without HTTP.

The peer is looked for on PYTHONPATH, as in benchmarks.ctr_speed.
"""

import sys
import tempfile
import time
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.table import Figure, options_parser, show

USERS, ITEMS, EACH, HISTORY = 1200, 600, 60, 10
BATCH, RATE, EPOCHS, WIDTH, HIDDEN = 1024, 1e-3, 12, 16, (64, 32)
SEEDS, CANDIDATES, LIMIT_MS = (0, 1, 2), 200, 15
TAGS = 12
OURS, PEER = "owlrec", "fuxictr 2.3.10"
FEATURES: Any = {
    "items": {"genre": "auto", "tags": {"table": "tag"}, "price": "quantiles", "stock": "log"},
    "users": {"user_id": {"hash": 4096}, "gender": "auto", "income": "log", "interests": {"table": "tag"}},
    "interactions": ["hour", "weekday", "device", "position"],
    "sequences": {"carts": ["cart", "purchase"]},
}


def main() -> None:
    """Both parts, in this process."""
    options = options_parser(__doc__).parse_args()
    features = shop(240 if options.quick else USERS)
    figures = _beside_peer(features, SEEDS[:1] if options.quick else SEEDS)
    figures += _requests(features)
    show("features of all types", figures, options)


def shop(n_users: int) -> Any:
    """Encoded features of the planted shop."""
    from pydantic import TypeAdapter

    from owlrec.ctr.features import FeatureSections, build_features
    from owlrec.ids import EVENTS
    from owlrec.schema import SAMPLES

    rng = np.random.default_rng(0)
    mood, taste = rng.normal(size=n_users), rng.normal(size=(n_users, 5))
    quality, genre = rng.normal(size=ITEMS), rng.integers(0, 5, ITEMS)
    tags = [sorted(rng.choice(TAGS, rng.integers(1, 4), replace=False).tolist()) for _ in range(ITEMS)]
    interests = [sorted(rng.choice(TAGS, rng.integers(1, 5), replace=False).tolist()) for _ in range(n_users)]
    price, income = rng.lognormal(3, 1, ITEMS), rng.lognormal(10, 1, n_users)
    rows: list[tuple[Any, ...]] = []
    more: dict[str, list[Any]] = {"history_events": [], "interactions/device": [], "interactions/position": []}
    for user in range(n_users):
        split = ("train", "train", "train", "valid", "test")[user % 5]
        seen: list[tuple[int, int]] = []
        for moment in range(EACH):
            item, device, position = int(rng.integers(ITEMS)), int(rng.integers(3)), int(rng.integers(1, 11))
            at = 1_700_000_000_000 + int(rng.integers(0, 30 * 86_400_000)) // EACH + moment * 86_400_000
            carted = sum(genre[i] == genre[item] for i, e in seen[-HISTORY:] if EVENTS[e - 1] in ("cart", "purchase"))
            logit = 0.4 * mood[user] + 0.8 * quality[item] + 0.5 * taste[user, genre[item]] - 0.15 * position
            logit += 0.5 * len({*tags[item]} & {*interests[user]}) + 0.4 * (device == 1) + 0.5 * min(carted, 2)
            logit += -0.3 * (np.log(price[item]) - 3) * (1.5 - 0.5 * (np.log(income[user]) - 10))
            logit += 0.4 * (at // 3_600_000 % 24 > 17) - 0.3
            click = rng.random() < 1 / (1 + np.exp(-logit))
            event = int(rng.choice([2, 3, 6], p=[0.6, 0.25, 0.15])) if click else 1
            last = seen[-HISTORY:]
            items, events = [i for i, _ in last], [e for _, e in last]
            rows.append(
                (user, item, float(click), at, items, [None] * len(last), [float(e > 1) for e in events], split)
            )
            for name, value in zip(more, (events, f"d{device}", str(position)), strict=True):
                more[name].append(value)
            seen.append((item, event))
    samples = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SAMPLES)
    for name, values in more.items():
        type_ = pa.list_(pa.uint8()) if name == "history_events" else pa.string()
        samples = samples.append_column(name, pa.array(values, type_))
    texts = pa.list_(pa.string())
    users = pa.table(
        {"user_id": range(n_users), "raw_id": map(str, range(n_users)), "gender": ["f", "m"] * (n_users // 2),
         "income": map(str, income), "interests": pa.array([[f"t{t}" for t in some] for some in interests], texts)}
    )  # fmt: skip
    items_table = pa.table(
        {"item_id": range(ITEMS), "raw_id": map(str, range(ITEMS)), "title": ["t"] * ITEMS,
         "genre": [f"g{g}" for g in genre], "tags": pa.array([[f"t{t}" for t in some] for some in tags], texts),
         "price": map(str, price), "stock": map(str, rng.integers(0, 500, ITEMS))}
    )  # fmt: skip
    sections = TypeAdapter(FeatureSections).validate_python(FEATURES)
    return build_features(users, items_table, samples, features=sections, min_item_count=2)


def _config() -> Any:
    from owlrec.ctr.experiment import CTRConfig

    return CTRConfig(batch_size=BATCH, learning_rate=RATE, epochs=EPOCHS, embed_dim=WIDTH, hidden_dims=HIDDEN)


def _beside_peer(features: Any, seeds: tuple[int, ...]) -> list[Figure]:
    from owlrec.ctr.experiment import Trial
    from owlrec.ctr.trainer import TrainingData, train_one

    methods: dict[str, Any] = {
        OURS: lambda seed: (
            train_one(
                Trial(backbone="dcnv2", arm="none", seed=seed), TrainingData(features, {}), _config()
            ).result.test.auc
        )
    }
    if find_spec("fuxictr"):
        methods[PEER] = lambda seed: _peer(features, seed)
    else:
        print(f"skipped: {PEER}, which is not on PYTHONPATH", file=sys.stderr)
    aucs: dict[str, list[float]] = {name: [] for name in methods}
    for seed in seeds:
        for name, train in methods.items():
            aucs[name].append(train(seed))
            print(f"seed {seed}: {name} {aucs[name][-1]:.4f}", file=sys.stderr, flush=True)
    n = f"dcnv2, {len(features.splits['train']):,} rows, test AUC, mean of {len(seeds)} seeds"
    return [
        Figure(measure=n, method=name, value=round(float(np.mean(values)), 4), unit=f"(±{np.std(values):.4f})")
        for name, values in aucs.items()
    ]


def _peer_columns(features: Any, split: str) -> dict[str, np.ndarray]:
    """The encoded columns by name; sequences are padded with 0."""
    samples, items, fields = features.splits[split].whole(), features.items, features.spec.fields
    columns: dict[str, np.ndarray] = {"item_id": items.codes[samples.items]}
    history, outcomes, events = samples.histories.matrices(slice(None))
    carts = np.where(np.isin(events, fields.sequences["carts"]), history, 0)
    coded = [f for f in fields.items if f.type != "log"]
    for name, rows in (("history", history), ("carts", carts)):
        columns[f"{name}/item_id"] = items.codes[rows]
        for at, field in enumerate(coded):
            columns[f"{name}/{field.column}"] = items.attributes[rows, at, : field.width].reshape(len(rows), -1)
    columns |= {"history/outcome": outcomes * (history > 0), "history/event": events}
    for at, field in enumerate(coded):
        columns[field.column] = items.attributes[samples.items, at, : field.width]
    columns["stock"] = items.numbers[samples.items, 0]
    for at, field in enumerate([f for f in fields.row_fields if f.type != "log"]):
        columns[field.column] = samples.fields[:, at, : field.width]
    columns["income"] = samples.numbers[:, 0]
    return columns


def _peer(features: Any, seed: int) -> float:
    import torch
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.layers import CrossNetV2, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    from owlrec.evaluation import auc

    spec = features.spec
    tables = {
        f.column: (f.table, spec.tables[f.table]) for f in (*spec.fields.items, *spec.fields.row_fields) if f.table
    }
    tables |= {"item_id": ("item_id", spec.n_items), "outcome": ("outcome", 12), "event": ("event", 7)}
    columns = {split: _peer_columns(features, split) for split in ("train", "valid", "test")}
    feature_map, first = FeatureMap("shop", ""), {}
    for name, values in columns["train"].items():
        column = name.rpartition("/")[2]
        if values.dtype == np.float32:
            feature_map.features[name] = {"type": "numeric", "source": ""}
            continue
        table, size = tables[column]
        about: dict[str, Any] = {"type": "categorical", "source": "", "vocab_size": size, "padding_idx": 0}
        if values.ndim == 2 and values.shape[1] > 1:
            about |= {
                "type": "sequence",
                "max_len": values.shape[1],
                "feature_encoder": "layers.MaskedAveragePooling()",
            }
        if table in first:
            about["share_embedding"] = first[table]
        else:
            first[table] = name
        feature_map.features[name] = about
    feature_map.labels, feature_map.default_emb_dim = ["label"], WIDTH
    feature_map.num_fields = feature_map.get_num_fields()

    class DCNv2(BaseModel):  # type: ignore[misc]
        """Its cross network and its MLP side by side, as in its model zoo."""

        def __init__(self) -> None:
            super().__init__(feature_map, model_id="dcnv2", gpu=-1, metrics=["AUC"], model_root=folder, verbose=0)
            self.embedding_layer = FeatureEmbedding(feature_map, WIDTH)
            width = feature_map.sum_emb_out_dim()
            self.cross = CrossNetV2(width, 3)
            self.deep = MLP_Block(input_dim=width, output_dim=None, hidden_units=list(HIDDEN))
            self.fc = torch.nn.Linear(width + HIDDEN[-1], 1)
            self.compile("adam", "binary_crossentropy", RATE)
            self.reset_parameters()

        def forward(self, inputs: Any) -> dict[str, Any]:
            flat = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
            crossed = torch.cat([self.cross(flat), self.deep(flat)], dim=-1)
            return {"y_pred": self.output_activation(self.fc(crossed))}

    labels = {split: features.splits[split].whole().labels for split in columns}
    tensors = {
        split: {
            **{name: torch.from_numpy(v if v.dtype == np.float32 else v.astype(np.int64)).squeeze(-1)
               for name, v in c.items()},
            "label": torch.from_numpy(labels[split]),
        }
        for split, c in columns.items()
    }  # fmt: skip

    def scores(split: str) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            return model(tensors[split])["y_pred"].squeeze(-1).double().numpy()

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        model = DCNv2()
        model._eval_steps, model._max_gradient_norm, model._total_steps = 10**9, 10.0, 0
        model._stop_training, model._epoch_index = False, 0
        best, test, since = 0.0, 0.0, 0
        n = len(labels["train"])
        for _ in range(EPOCHS):
            model.train()
            batches = torch.randperm(n).split(BATCH)
            model.train_epoch([{name: t[rows] for name, t in tensors["train"].items()} for rows in batches])
            valid = auc(labels["valid"], scores("valid"))
            if valid > best:
                best, test, since = valid, auc(labels["test"], scores("test")), 0
            elif (since := since + 1) == 2:
                break
    return test


def _requests(features: Any) -> list[Figure]:
    import torch

    from owlrec.ctr.artifact import CtrScorer, LiveState, User
    from owlrec.ctr.backbones import BACKBONES
    from owlrec.ctr.experiment import CTRConfig
    from owlrec.ctr.model import CTRModel, ModelSpec

    torch.set_num_threads(1)
    figures = []
    candidates = list(range(CANDIDATES))
    user = User(
        7, list(range(HISTORY)), taken=[True] * HISTORY, events=["cart", "click"] * (HISTORY // 2),
        profile={"gender": "f", "income": 20000, "interests": ["t1", "t2"]}, context={"device": "d1", "position": 1},
    )  # fmt: skip
    for backbone in BACKBONES:
        torch.manual_seed(0)
        model = CTRModel(ModelSpec.of(features.spec, backbone, 0, CTRConfig()), features.items).eval()
        scorer, live = CtrScorer(model, features.items, features.vocabularies), LiveState(model, None)
        times = []
        for _ in range(220):
            started = time.perf_counter()
            scorer.score(user, candidates, live)
            times.append(1000 * (time.perf_counter() - started))
        median, p99 = np.percentile(times[20:], [50, 99])
        print(f"{backbone}: {median:.1f} ms, p99 {p99:.1f}", file=sys.stderr, flush=True)
        figures.append(
            Figure(
                measure=f"{backbone}, {CANDIDATES} candidates, 12 features and a sequence, median",
                method=OURS,
                value=round(float(median), 1),
                unit=f"ms (p99 {p99:.1f}; goal {LIMIT_MS})",
            )
        )
    return figures


if __name__ == "__main__":
    main()
