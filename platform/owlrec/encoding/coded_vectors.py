"""The codes column of vectors tables: a quantiser of their own for the vectors of each source and kind.

Users and items are coded apart. Their texts read differently ("the user prefers", "the film tells"), so that a common
first level would spend its codes on telling users from items, which their keys do already; and a refresh, which brings
new vectors of users, needs the users' quantiser alone. Cohorts have no codes: a cohort is a category itself.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.encoding.code_quality import QuantisationReport, measure_codes
from owlrec.encoding.semantic_ids import Quantiser, SemanticIdConfig, train_quantiser, with_duplicate_digit
from owlrec.errors import SchemaError
from owlrec.schema import vector_matrix
from owlrec.workspace import Workspace

CODED_KINDS = ("user", "item")
_REPORT = "report.json"
_LAST_DIGIT = (1 << 16) - 1  # a code is a uint16, the digit as well


@dataclass(frozen=True)
class CodedVectors:
    """A vectors table with its codes, and where they come from."""

    table: pa.Table
    quantiser: Quantiser
    report: QuantisationReport

    def save(self, workspace: Workspace, folder: str, name: str) -> None:
        """Writes codebooks and report beside the table `name` of a folder of vectors; the table itself is not
        written.
        """
        self.quantiser.save(workspace, _quantiser_folder(folder, name))
        workspace.write_json(f"{_quantiser_folder(folder, name)}/{_REPORT}", self.report.model_dump(mode="json"))


def code_vectors(table: pa.Table, config: SemanticIdConfig) -> CodedVectors:
    """Trains a quantiser on a vectors table of one kind (schema.vectors_schema) and codes its rows.

    Raises SchemaError for a table without rows, and see train_quantiser and with_duplicate_digit.
    """
    vectors = vector_matrix(table)
    quantiser = train_quantiser(vectors, config)
    codes = with_duplicate_digit(quantiser.encode(vectors), table["id"].to_numpy())
    return CodedVectors(with_codes(table, codes), quantiser, measure_codes(quantiser, codes, vectors))


def code_new_vectors(
    table: pa.Table, quantiser: Quantiser, earlier: tuple[np.ndarray, np.ndarray], *, last_digit: int
) -> pa.Table:
    """A vectors table whose rows are coded by a quantiser that is there already.

    An id whose codes stay what they were keeps its duplicate digit. All others get digits above any that the ids of
    this kind have so far, so that no table of all ids need be searched for equals.
    earlier: the ids' present semantic ids, aligned (uint16 [n, levels + 1], the digit last; mask bool [n]).
    last_digit: the greatest digit that any id of the kind has.
    Raises SchemaError where digits run out.
    """
    before, known = earlier
    codes = quantiser.encode(vector_matrix(table))
    same = known.copy()
    if known.any():  # else the earlier ones may have another width: none
        same[known] = (before[known, :-1] == codes[known]).all(axis=1)
    full = np.zeros((len(codes), codes.shape[1] + 1), dtype=np.int64)
    full[:, :-1] = codes
    full[same, -1] = before[same, -1] if same.any() else 0
    new = with_duplicate_digit(codes[~same], table["id"].to_numpy()[~same])
    full[~same, -1] = new[:, -1].astype(np.int64) + last_digit + 1
    if len(full) and full[:, -1].max() > _LAST_DIGIT:
        raise SchemaError(
            f"semantic ids: duplicate digits beyond {_LAST_DIGIT:,} are needed, since each refresh counts on from the "
            "one before. Run `encode` and `publish`, which number all ids anew."
        )
    return with_codes(table, full.astype(np.uint16))


def with_codes(table: pa.Table, codes: np.ndarray) -> pa.Table:
    """A vectors table with these semantic ids: uint16 [n, levels + 1], aligned with its rows."""
    n, width = codes.shape
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * width)
    lists = pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(codes, dtype=np.uint16).reshape(-1)))
    column = table.schema.get_field_index("codes")
    return table.set_column(column, table.schema.field(column), lists)


def codes_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The semantic ids in a vectors table: (uint16 [n, width], mask bool [n]), zeros and False where a row has none.

    Raises SchemaError where rows have different numbers of codes.
    """
    lists = table["codes"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    widths = np.unique(lengths[lengths > 0])
    if len(widths) > 1:
        raise SchemaError(
            f"vectors: rows have {' and '.join(map(str, widths))} codes. Their codes are of different quantisers: run "
            "`encode` again."
        )
    mask = lengths > 0
    codes = np.zeros((len(lengths), int(widths[0]) if len(widths) else 0), dtype=np.uint16)
    codes[mask] = pc.list_flatten(lists).to_numpy(zero_copy_only=False).reshape(mask.sum(), codes.shape[1])
    return codes, mask


def read_quantisers(workspace: Workspace, folder: str, source: str) -> dict[str, Quantiser]:
    """By kind, the quantisers of a source whose vectors `encode` wrote into a folder; those that are not there are left
    out.
    """
    places = {kind: _quantiser_folder(folder, f"{source}-{kind}") for kind in CODED_KINDS}
    return {kind: Quantiser.load(workspace, place) for kind, place in places.items() if workspace.exists(place)}


def read_reports(workspace: Workspace, folder: str) -> dict[str, QuantisationReport]:
    """The reports on the vectors in a folder, by the name of their table ("knowledge-user")."""
    names = workspace.names(_quantiser_folder(folder, ""))
    files = {name: f"{_quantiser_folder(folder, name)}/{_REPORT}" for name in names}
    return {name: QuantisationReport.model_validate(workspace.read_json(file)) for name, file in files.items()}


def _quantiser_folder(folder: str, name: str) -> str:
    return f"{folder}/quantisers/{name}".rstrip("/")
