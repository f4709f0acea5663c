"""The codes of vectors tables: codebooks of their own for the vectors of each source and kind.

Users and items are coded apart. Their texts read differently ("the user prefers", "the film tells"), so that a common
first level would spend its codes on telling users from items, which their keys do already; and a refresh, which brings
new vectors of users, needs the users' codebooks alone. Cohorts have no codes: a cohort is a category itself.
Codebooks are fitted once, on a bounded sample; whatever is encoded later is coded by the same ones.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.encoding.code_quality import QuantisationReport, measure_codes
from owlrec.encoding.semantic_ids import Quantiser, SemanticIdConfig, code_vectors, train_quantiser
from owlrec.errors import SchemaError
from owlrec.workspace import Workspace

CODED_KINDS = ("user", "item")
CODED_SOURCES = ("knowledge", "metadata")  # members of a cohort share its vector, and have its name for a category
_REPORT = "report.json"


def fit_codebooks(
    workspace: Workspace, folder: str, name: str, ids: np.ndarray, vectors: np.ndarray, config: SemanticIdConfig
) -> QuantisationReport:
    """Fits codebooks on a sample of the vectors `name` of a folder, keeps them beside these, and measures them.

    ids: int64 [n]; vectors: float [n, d], aligned. Codebooks that another run has kept meanwhile stay.
    Raises SchemaError as train_quantiser.
    """
    train_quantiser(vectors, config).save(workspace, quantiser_folder(folder, name))
    quantiser = Quantiser.load(workspace, quantiser_folder(folder, name))
    report = measure_codes(quantiser, code_vectors(quantiser, ids, vectors), vectors)
    workspace.write_json(f"{quantiser_folder(folder, name)}/{_REPORT}", report.model_dump(mode="json"))
    return report


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
    places = {kind: quantiser_folder(folder, f"{source}-{kind}") for kind in CODED_KINDS}
    return {kind: Quantiser.load(workspace, place) for kind, place in places.items() if workspace.exists(place)}


def read_reports(workspace: Workspace, folder: str) -> dict[str, QuantisationReport]:
    """The reports on the vectors in a folder, by the name of their table ("knowledge-user")."""
    names = workspace.names(quantiser_folder(folder, ""))
    files = {name: f"{quantiser_folder(folder, name)}/{_REPORT}" for name in names}
    return {
        name: QuantisationReport.model_validate(workspace.read_json(file))
        for name, file in files.items()
        if workspace.exists(file)
    }


def quantiser_folder(folder: str, name: str) -> str:
    """Where the codebooks of the vectors `name` of a folder are."""
    return f"{folder}/quantisers/{name}".rstrip("/")
