"""Does an LLM's text beat ids, and the text one has? The experiments of docs/proof.md, which was written before them.

    python -m benchmarks.proof --data DIR --only temporal       # each part within an hour on two cores

Parts: `temporal` (CoLLM's slice of MovieLens-1M), `wide` (187,490 labels by user), `cold` (the same by film), `curve`
(shares of the training rows), `dose` (sentences of which a share is false), `opaque` (LastFM, warm and cold artists).
Data is read from a folder of public files; a part whose files are missing is skipped with their names.
"""

import argparse
import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.proof_designs import Design, collaborative_scores, dose, missing_files, opaque, temporal, wide
from benchmarks.table import Figure, options_parser, show
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.dataset import reduced
from owlrec.ctr.experiment import CTRConfig, PairedDifference, Trial, slices_of
from owlrec.ctr.features import Features, FeatureSections, build_features
from owlrec.ctr.knowledge_tables import KnowledgeTable, OwnArm
from owlrec.ctr.trainer import Trained, TrainingData, train_one
from owlrec.encoding.vectors import Encoder, EncoderConfig
from owlrec.evaluation import auc, bootstrap_aucs, mean_over_seeds, means_by_seed, percentile_interval
from owlrec.machine import cache_folder
from owlrec.ops.console import note

RESAMPLES = 1000
CATEGORIES = "categories"  # ids and genres, no text
MANY = ("din", "dcnv2")  # backbones with more seeds and folds
SHARES = (0.01, 0.05, 0.25, 1.0)
FALSE_SHARES = (0.0, 0.25, 0.5, 1.0)
# (arm, its base): what docs/proof.md names as primary comes first.
COMPARED = {
    "temporal": (
        ("llm_a", "metadata"),
        ("llm_a", "none"),
        ("llm_b", "metadata"),
        ("facts_llm_a", "facts"),
        ("facts", "metadata"),
        ("llm_a", "title"),
        ("llm_a", "shuffled-llm_a"),
        ("metadata", "none"),
    ),
    "wide": (
        ("llm_a", "metadata"),
        ("llm_a", "none"),
        ("metadata", "none"),
        ("llm_b_users", "none"),
        ("llm_b_users", "shuffled-llm_b_users"),
    ),
    "cold": (("llm_a", "metadata"), ("llm_a", "none"), ("metadata", "none"), ("facts_llm_a", "facts")),
    "curve": (("llm_a", "metadata"), ("llm_a", "none"), ("metadata", "none")),
    "dose": (("sentences", "none"), (CATEGORIES, "none")),
    "opaque": (
        ("tags", "names"),
        ("prose", "tags"),
        ("tags_prose", "tags"),
        ("names", "none"),
        ("prose", "shuffled-prose"),
    ),
}
_FILMS = ("title", "metadata", "facts", "llm_a", "llm_b")
ARMS: dict[str, dict[str, OwnArm]] = {
    "temporal": {name: OwnArm(items=(name,)) for name in _FILMS}
    | {"facts_llm_a": OwnArm(items=("facts", "llm_a")), "shuffled-llm_a": OwnArm(items=("llm_a",))},
    "wide": {name: OwnArm(items=(name,)) for name in ("metadata", "llm_a")}
    | {name: OwnArm(users=("llm_b",)) for name in ("llm_b_users", "shuffled-llm_b_users")},
    "cold": {name: OwnArm(items=(name,)) for name in ("metadata", "facts", "llm_a")}
    | {"facts_llm_a": OwnArm(items=("facts", "llm_a"))},
    "curve": {name: OwnArm(items=(name,)) for name in ("metadata", "llm_a")},
    "dose": {"sentences": OwnArm(items=("sentences",))},
    "opaque": {name: OwnArm(items=(name,)) for name in ("names", "tags", "prose")}
    | {"tags_prose": OwnArm(items=("tags", "prose")), "shuffled-prose": OwnArm(items=("prose",))},
}


@dataclass(frozen=True)
class Fold:
    """Test scores of one design, by (backbone, arm, seed)."""

    user_ids: np.ndarray
    labels: np.ndarray
    scores: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict)
    slices: Mapping[str, np.ndarray] = field(default_factory=dict)


def main() -> None:
    """Runs the parts that were asked for."""
    parser = options_parser(__doc__)
    parts: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
        "temporal": _temporal,
        "wide": _by_fold,
        "cold": _by_fold,
        "curve": _curve,
        "dose": _dose,
        "opaque": _opaque,
    }
    parser.add_argument("--data", type=Path, required=True, help="folder of the public files that docs/proof.md names")
    parser.add_argument("--only", nargs="+", choices=tuple(parts), default=list(parts))
    parser.add_argument("--backbones", nargs="+", choices=tuple(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--seeds", type=int, default=3, help="or folds, of each backbone")
    parser.add_argument("--more-seeds", type=int, help=f"of {' and '.join(MANY)} (default: 5, and all ten folds)")
    options = parser.parse_args()
    if options.quick:
        options.backbones, options.seeds, options.more_seeds = list(MANY), 1, 1
    figures: list[Figure] = []
    for part in options.only:
        files = {"cold": "wide", "curve": "wide"}.get(part, part)
        if missing := missing_files(options.data, files):
            note(f"{part} skipped: {options.data} lacks {', '.join(missing)}")
            continue
        options.part = part
        figures += parts[part](options)
    show("proof with real LLM texts", figures, options)


# ---------------------------------------------------------------------------------------------------------------- parts


def _temporal(options: argparse.Namespace) -> Iterator[Figure]:
    design = temporal(options.data)
    fold = _trained("temporal", design, options, lambda b: range(_number(options, b, 5)))
    yield from _figures("temporal", "temporal", options, [fold])


def _by_fold(options: argparse.Namespace) -> Iterator[Figure]:
    """`wide` and `cold`: fold k is trained with seed k."""
    numbers = {b: _number(options, b, 10) for b in options.backbones}
    folds = []
    for number in range(max(numbers.values())):
        design = wide(options.data, number, cold=options.part == "cold")
        folds.append(_trained(options.part, design, options, lambda b, k=number: [k] if k < numbers[b] else []))  # type: ignore[misc]
    yield from _figures(options.part, options.part, options, folds)


def _curve(options: argparse.Namespace) -> Iterator[Figure]:
    options.backbones = [b for b in options.backbones if b in MANY]
    for share in SHARES:
        folds = [
            _trained("curve", wide(options.data, k, share=share), options, lambda _, k=k: [k])  # type: ignore[misc]
            for k in range(options.seeds)
        ]
        yield from _figures("curve", f"{share:.0%} of the training rows", options, folds)


def _dose(options: argparse.Namespace) -> Iterator[Figure]:
    options.backbones = [b for b in options.backbones if b in MANY]
    for share in FALSE_SHARES:
        fold = _trained("dose", dose(share), options, lambda b: range(_number(options, b, 5)))
        yield from _figures("dose", f"{share:.0%} of the sentences false", options, [fold])


def _opaque(options: argparse.Namespace) -> Iterator[Figure]:
    for cold in (False, True):
        design = opaque(options.data, cold=cold)
        measure = f"opaque names, {'cold' if cold else 'warm'} artists"
        fold = _trained("opaque", design, options, lambda b: range(options.seeds))
        if not cold:
            by_cf = auc(fold.labels, collaborative_scores(design))
            yield Figure(measure=measure, method="collaborative filtering", value=round(by_cf, 4), unit="test AUC")
        yield from _figures("opaque", measure, options, [fold])


def _number(options: argparse.Namespace, backbone: str, more: int) -> int:
    return int(options.more_seeds or more) if backbone in MANY and not options.quick else int(options.seeds)


# ------------------------------------------------------------------------------------------------------------- training


def _trained(part: str, design: Design, options: argparse.Namespace, seeds: Callable[[str], Iterable[int]]) -> Fold:
    """Every arm with every backbone and seed, on one design."""
    plain, with_genres = _features(design, categories=False), _features(design, categories=True)
    knowledge = _vectors(design, ARMS[part].values())
    fold: Fold | None = None
    for backbone in options.backbones:
        for seed in seeds(backbone):
            for arm in ("none", CATEGORIES, *ARMS[part]):
                own = ARMS[part].get(arm)
                data = TrainingData(with_genres if arm == CATEGORIES else plain, knowledge)
                trial = Trial(backbone=backbone, arm="none" if own is None else arm, seed=seed, own=own)
                trained = train_one(trial, data, CTRConfig())
                if fold is None:
                    fold = Fold(trained.test.user_ids, trained.test.labels, slices=_slices(design, data, trained))
                fold.scores[backbone, arm, seed] = trained.test.scores
                note(f"{part}: {backbone}, {arm}, seed {seed}: {trained.result.test.auc:.4f}")
    assert fold is not None
    return fold


def _features(design: Design, *, categories: bool) -> Features:
    columns: FeatureSections = {"items": tuple(n for n in design.items.column_names if n in ("genres", "year"))}
    if not categories:
        columns["items"] = ()
    return build_features(design.users, design.items, design.samples, features=columns, min_item_count=2)


def _slices(design: Design, data: TrainingData, trained: Trained) -> dict[str, np.ndarray]:
    test = data.features.splits["test"].whole()
    made = slices_of(test.items, test.history_lengths, data.features.item_counts)
    return {name: made[name] for name in ("cold items", "warm items") if name in made} | dict(design.slices)


def _vectors(design: Design, arms: Iterable[OwnArm]) -> dict[str, dict[str, KnowledgeTable]]:
    """The vectors of the sources that the arms read, reduced together as `train_ctr` does."""
    read = {("item", source) for arm in arms for source in arm.items} | {
        ("user", source) for arm in arms for source in arm.users
    }
    texts = {"item": design.item_texts, "user": design.user_texts}
    tables = {f"{source}-{kind}": _encoded(texts[kind][source]) for kind, source in sorted(read)}
    smaller = reduced(tables, CTRConfig().knowledge_variance)
    knowledge: dict[str, dict[str, KnowledgeTable]] = {}
    for kind, source in read:
        knowledge.setdefault(source, {})[kind] = smaller[f"{source}-{kind}"]
    return knowledge


def _encoded(texts: Mapping[int, str]) -> KnowledgeTable:
    """Vectors of texts by id, encoded once per machine."""
    ids = np.array(sorted(id_ for id_, text in texts.items() if text.strip()), np.int64)
    ordered = [texts[int(id_)] for id_ in ids]
    digest = hashlib.sha256("\0".join(ordered).encode()).hexdigest()[:16]
    file = cache_folder("benchmarks") / f"proof-{digest}.npy"
    if not file.exists():
        np.save(file, Encoder(EncoderConfig()).encode(ordered).astype(np.float16))
    return KnowledgeTable(ids, np.load(file), encoder=EncoderConfig().model)


# -------------------------------------------------------------------------------------------------------------- figures


def _figures(part: str, measure: str, options: argparse.Namespace, folds: Sequence[Fold]) -> Iterator[Figure]:
    for backbone in options.backbones:
        for arm in ("none", CATEGORIES, *ARMS[part]):
            values = [auc(f.labels, s) for f in folds for (b, a, _), s in f.scores.items() if (b, a) == (backbone, arm)]
            spread = f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else ""
            unit = f"test AUC ({'seeds' if len(folds) == 1 else 'folds'}: {len(values)}{spread})"
            yield Figure(
                measure=f"{measure}, {backbone}", method=arm, value=round(statistics.fmean(values), 4), unit=unit
            )
    for arm, base in COMPARED[part]:
        for backbones in ([backbone] for backbone in options.backbones):
            yield from _difference(measure, backbones, arm, base, folds)
        if len(options.backbones) > 1:
            yield from _difference(measure, options.backbones, arm, base, folds)
        for name in dict.fromkeys(name for fold in folds for name in fold.slices):
            yield from _difference(measure, options.backbones, arm, base, folds, name)


def _difference(
    measure: str,
    backbones: Sequence[str],
    arm: str,
    base: str,
    folds: Sequence[Fold],
    part: str | None = None,
) -> Iterator[Figure]:
    """Mean difference over backbones, seeds and folds; users are resampled within each fold, and seeds with them."""
    means, drawn = [], []
    for number, fold in enumerate(folds):
        pairs = [(b, s) for b, a, s in fold.scores if a == arm and b in backbones]
        if not pairs:
            continue
        rows = fold.slices[part] if part else np.ones(len(fold.labels), bool)
        if len(np.unique(fold.user_ids[rows])) < 2 or len(np.unique(fold.labels[rows])) < 2:
            continue
        vectors = [fold.scores[b, a, s][rows] for b, s in pairs for a in (arm, base)]
        labels, users = fold.labels[rows], fold.user_ids[rows]
        each = np.array([auc(labels, vector) for vector in vectors])
        aucs = bootstrap_aucs(labels, vectors, users, resamples=RESAMPLES, seed=number)
        means.append((each[::2] - each[1::2], [s for _, s in pairs]))
        drawn.append(aucs[:, ::2] - aucs[:, 1::2])
    if not means:
        return
    by_fold = (means_by_seed(d, seeds) for d, (_, seeds) in zip(drawn, means, strict=True))
    resampled = np.stack([mean_over_seeds(seeds, number) for number, seeds in enumerate(by_fold)]).mean(axis=0)
    values = np.concatenate([values for values, _ in means])
    interval = percentile_interval(resampled)
    paired = PairedDifference(seeds=len(values), auc=float(values.mean()), rela_imp=None, interval=interval)
    who = backbones[0] if len(backbones) == 1 else f"{len(backbones)} backbones"
    where = f", {part}" if part else ""
    unit = (
        f"AUC [{interval.low:+.4f}, {interval.high:+.4f}], {paired.verdict} "
        f"(smallest that would show {paired.detectable:.4f})"
    )
    yield Figure(
        measure=f"{measure}{where}: {arm} - {base}", method=who, value=round(float(values.mean()), 4), unit=unit
    )


if __name__ == "__main__":
    main()
