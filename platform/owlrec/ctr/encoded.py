"""Encoded samples on disk, memory-mapped: data sets larger than memory, and one encoding for all workers.

The tables are encoded once, part by part, to one .npy file a column and split; all workers of a machine map the same
files, and a batch reads the pages that its rows stand on (`order` keeps these few). Ray Data could stream the Parquet
files instead, but neither its iterator nor its local shuffle can be entered again at a position, so a restarted worker
would see other batches than the one that died. Here a position is a number.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa

from owlrec.ctr.features import (
    SPLITS,
    Features,
    ItemFeatures,
    SampleFeatures,
    Vocabularies,
    encode_items,
    encode_samples,
    of_split,
    survey,
)

DONE = "done.json"  # written last


def encode_to_folder(
    users: pa.Table,
    items: pa.Table,
    parts: Callable[[], Iterable[pa.Table]],
    folder: Path,
    *,
    attributes: Sequence[str],
    profile: Sequence[str],
    min_item_count: int,
) -> Vocabularies:
    """Writes what `open_features` reads; a part is in memory at a time.

    parts: called twice, gives the samples table in parts, each time the same. Other arguments and errors: see
    `build_features`. Returns the vocabularies, which the folder does not hold.
    """
    found = survey(parts())
    vocabularies = found.vocabularies(users, items, attributes, profile, min_item_count)
    item_features = encode_items(items, vocabularies)
    folder.mkdir(parents=True, exist_ok=True)
    for field in fields(ItemFeatures):
        np.save(folder / f"items-{field.name}.npy", getattr(item_features, field.name))
    files: dict[str, np.ndarray] = {}
    written = dict.fromkeys(SPLITS, 0)
    for part in parts():
        for split in SPLITS:
            encoded = encode_samples(of_split(part, split), users, item_features, vocabularies, found.history_length)
            start, end = written[split], written[split] + len(encoded)
            for field in fields(SampleFeatures):
                values, name = getattr(encoded, field.name), f"{split}-{field.name}.npy"
                if name not in files:
                    shape = (found.rows[split], *values.shape[1:])
                    files[name] = _create(folder / name, values.dtype, shape)
                files[name][start:end] = values
            written[split] = end
    for array in files.values():
        if isinstance(array, np.memmap):
            array.flush()
    (folder / DONE).write_text(json.dumps({"history_length": found.history_length}))
    return vocabularies


def _create(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:  # nothing to map
        np.save(path, np.empty(shape, dtype))
        return np.empty(shape, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def open_features(folder: Path, vocabularies: Vocabularies) -> Features:
    """What `encode_to_folder` wrote; samples are mapped, not read."""
    length = json.loads((folder / DONE).read_text())["history_length"]
    items = ItemFeatures(**{f.name: np.load(folder / f"items-{f.name}.npy") for f in fields(ItemFeatures)})
    splits = {
        split: SampleFeatures(**{f.name: _map(folder / f"{split}-{f.name}.npy") for f in fields(SampleFeatures)})
        for split in SPLITS
    }
    return Features(vocabularies.spec(length), vocabularies, items, splits)


def _map(path: Path) -> np.ndarray:
    """Copy-on-write, for torch takes writable arrays only; nobody writes."""
    array: np.ndarray = np.load(path, mmap_mode="c")
    return array
