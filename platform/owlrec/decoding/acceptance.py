"""How often drafts are accepted, learnt while decoding, by the kind of evidence behind a token.

A cell is a pair of match length (1, 2, 3, 4, 5-6, 7-9, 10-15, 16 and more tokens) and vote (a single occurrence; under
35, 55, 75, 95 % of several; unanimous with 2-3 or with 4 and more). Counts alone mislead: one occurrence of a long
match is accepted far more often than a split vote, and much depends on the model and the texts. Rates start from what
SmolLM2-135M's knowledge texts showed and move with what the verifier says; old observations fade, since refreshed texts
drift.
"""

import numpy as np

LENGTHS, EVIDENCE = 8, 7
CELLS = LENGTHS * EVIDENCE
_PRIOR_WEIGHT = 8.0  # observations that the prior counts for
_MEMORY = 512.0  # observations after which a cell's counts are halved
_PRIOR = np.array(
    [
        [0.35, 0.15, 0.30, 0.35, 0.35, 0.40, 0.40],
        [0.65, 0.25, 0.35, 0.40, 0.45, 0.70, 0.75],
        [0.65, 0.25, 0.35, 0.45, 0.55, 0.75, 0.80],
        [0.70, 0.25, 0.40, 0.45, 0.55, 0.80, 0.85],
        [0.75, 0.25, 0.40, 0.50, 0.60, 0.85, 0.90],
        [0.80, 0.25, 0.40, 0.50, 0.60, 0.90, 0.95],
        [0.80, 0.25, 0.40, 0.55, 0.65, 0.90, 0.95],
        [0.90, 0.25, 0.40, 0.55, 0.75, 0.90, 0.95],
    ]
)


class AcceptanceRates:
    """Acceptance rates by group (a kind of source under a kind of verification) and cell.

    rates: float64 [groups, CELLS], the current estimate of the probability that a token is accepted, given that all
    before it in its draft were.
    """

    def __init__(self, groups: int) -> None:
        self._prior = np.tile(_PRIOR.reshape(1, CELLS), (groups, 1))
        self._tried = np.zeros((groups, CELLS))
        self._accepted = np.zeros((groups, CELLS))
        self.rates = self._prior.copy()

    def observe(self, group: np.ndarray, cell: np.ndarray, accepted: np.ndarray) -> None:
        """Takes in the fate of n verified tokens: those up to and including the first rejected one of each draft.

        group, cell: int [n]. accepted: bool [n].
        """
        np.add.at(self._tried, (group, cell), 1.0)
        np.add.at(self._accepted, (group, cell), accepted.astype(np.float64))
        if self._tried.max() > _MEMORY:
            fade = np.where(self._tried > _MEMORY, 0.5, 1.0)
            self._tried *= fade
            self._accepted *= fade
        self.rates = (self._accepted + _PRIOR_WEIGHT * self._prior) / (self._tried + _PRIOR_WEIGHT)
