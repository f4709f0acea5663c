"""Tables of texts -> vectors tables, in memory, and the texts of the metadata-only control arm (see inputs.py)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.encoding.encoder import TextEncoder
from owlrec.errors import SchemaError
from owlrec.schema import vectors_table
from owlrec.sources.catalog import ItemCatalog

_NO_ATTRIBUTES = {"user_id", "item_id", "raw_id", "title"}


def encode_knowledge(
    knowledge: pa.Table, encoder: TextEncoder, on_batch: Callable[[int], None] | None = None
) -> pa.Table:
    """The vectors table (schema.vectors_schema) of a knowledge table (schema.KNOWLEDGE), row by row.

    A row whose text is empty has no vector: downstream it is a miss with its learned default, not a zero that looks
    like knowledge.
    """
    texts = [text or "" for text in knowledge["text"].to_pylist()]
    return encode_texts(knowledge["kind"].to_pylist(), knowledge["id"].to_numpy(), texts, encoder, on_batch)


def encode_texts(
    kind: str | Sequence[str],
    ids: Sequence[int] | np.ndarray,
    texts: Sequence[str],
    encoder: TextEncoder,
    on_batch: Callable[[int], None] | None = None,
) -> pa.Table:
    """The vectors table of texts aligned with `ids`, of one kind or of a kind each. Empty texts are left out."""
    if len(ids) != len(texts):
        raise ValueError(f"{len(ids)} ids but {len(texts)} texts")
    rows = [row for row, text in enumerate(texts) if text.strip()]
    kinds = kind if isinstance(kind, str) else [kind[row] for row in rows]
    return vectors_table(kinds, np.asarray(ids, dtype=np.int64)[rows], encoder.encode(texts, on_batch)[rows])


def item_metadata_text(row: Mapping[str, Any]) -> str:
    """An item as `title; attribute: value, value; ...` from a row of the items table; empty attributes are left out."""
    return "; ".join(part for part in (str(row.get("title") or ""), *_attributes(row)) if part)


def user_metadata_text(profile: Mapping[str, Any], titles: Sequence[str], ratings: Sequence[float | None]) -> str:
    """A user as profile fields and rated titles, from a row of the users table and the history that the LLM read.

    titles, ratings: aligned, oldest first, as in schema.HISTORIES. The text lists the most recent first: what an
    encoder's window cuts off is then the oldest.
    """
    liked = [
        f"{title} ({rating:g})" if rating is not None else title
        for title, rating in zip(reversed(titles), reversed(ratings), strict=True)
        if title
    ]
    return "; ".join([*_attributes(profile), *([f"history: {', '.join(liked)}"] if liked else [])])


def item_metadata(items: pa.Table) -> tuple[np.ndarray, list[str]]:
    """Ids (int64 [n]) and metadata texts of an items table."""
    return items["item_id"].to_numpy(), [item_metadata_text(row) for row in items.to_pylist()]


def user_metadata(users: pa.Table, catalog: ItemCatalog, histories: pa.Table) -> tuple[np.ndarray, list[str]]:
    """Ids (int64 [n]) and metadata texts of the users who have a history, in the order of `histories`
    (schema.HISTORIES).

    Raises SchemaError where a history is of a user whom the table lacks.
    """
    items = histories["items"].combine_chunks()
    titles = catalog.titles(items.flatten().to_numpy())
    ends = np.cumsum(items.value_lengths().to_numpy()).tolist()
    profiles = {row["user_id"]: row for row in users.to_pylist()}
    ids, texts = histories["user_id"].to_pylist(), []
    starts = [0, *ends[:-1]] if ends else []
    for user, start, end, ratings in zip(ids, starts, ends, histories["ratings"].to_pylist(), strict=True):
        if user not in profiles:
            raise SchemaError(
                f"histories, user {user}: the users table has no such row. Run `prepare` again: the tables are of "
                "different runs."
            )
        texts.append(user_metadata_text(profiles[user], titles[start:end], ratings))
    return histories["user_id"].to_numpy(), texts


def _attributes(row: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        text = ", ".join(str(v) for v in values if v not in (None, ""))
        if name not in _NO_ATTRIBUTES and text:
            parts.append(f"{name}: {text}")
    return parts
