"""What semantic ids are worth on the vectors that they stand for: are they unique, are all codes used, what is lost."""

from typing import TYPE_CHECKING

import numpy as np

from owlrec.config import Config
from owlrec.encoding.packed_codes import packed_bytes

if TYPE_CHECKING:
    from owlrec.encoding.semantic_ids import Quantiser

_ROWS_AT_ONCE = 1 << 13


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
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        exact = np.asarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float64)
        error += float(np.square(exact - quantiser.decode(levels[start : start + _ROWS_AT_ONCE])).sum())
        energy += float(np.square(exact).sum())
    return QuantisationReport(
        vectors=len(codes),
        unique_rate=len(np.unique(levels, axis=0)) / len(codes),
        unique_rate_with_digit=len(np.unique(codes, axis=0)) / len(codes),
        code_usage=tuple(len(np.unique(column)) / size for column, size in zip(levels.T, sizes, strict=True)),
        relative_error=error / max(energy, float(np.finfo(np.float64).tiny)),
        bytes_per_entity=packed_bytes(codes[:, -1].tolist(), sizes) / len(codes),
    )
