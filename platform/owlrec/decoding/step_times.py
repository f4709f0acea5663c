"""How long a step takes: t = a + b * tokens, steeper beyond each knee, + c * context tokens read by attention.

Fitted by recursive least squares on every step, prefill included (SmartSpec, arXiv 2406.14066, fits a straight line
offline). A GPU's curve has a knee that nobody knows beforehand, so there is a hinge at each of some sizes, whose weight
stays near zero unless steps show one; beyond what was seen the last slope goes on. Drafts of a row share the read of
its context, so that the third term counts rows, not drafts.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

_KNEES = np.array([8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096], dtype=np.float64)
_MEMORY = 100.0  # steps that the fit remembers
_NOISE = 0.04  # of a step's time, relative
_OUTLIER = 1.5  # a step further from the estimate than this factor counts as that far: a hiccup is not a trend
_SHIFT = 1.2  # where _SHIFTED steps in a row are this far off on one side, the machine has another speed
_SHIFTED = 6
_FLAT_TOKENS = 64.0  # a step of about so many tokens is expected to cost twice a step of one, before any was seen
_FLAT_CONTEXT = 65536.0  # the same for context tokens


_EDGES = np.concatenate([[0.0], _KNEES, [2.0**24]])
_WIDTHS = np.diff(_EDGES)
# Rows that give the slope between two knees and of context.
_RISES = np.zeros((len(_KNEES) + 2, len(_KNEES) + 3))
_RISES[:-1, 1:-1] = np.tri(len(_KNEES) + 1)
_RISES[-1, -1] = 1.0


class StepTimes:
    """Seconds of a step by its tokens and by the context tokens that its rows read."""

    def __init__(self, tokens: Sequence[float] | np.ndarray, seconds: Sequence[float] | np.ndarray) -> None:
        """tokens, seconds: steps measured at start, without context. Raises ValueError for none, or a time that is
        not positive."""
        if len(tokens) == 0 or min(seconds) <= 0:
            raise ValueError(
                f"step times need one or more measured steps of positive time, not {list(tokens)} at {list(seconds)}"
            )
        base = float(min(seconds))
        self.largest = 0.0  # tokens of the largest step seen
        self.seen = 0
        self._at_edges: np.ndarray | None = None  # seconds beyond those of no token, at the edges of the slopes
        self._ratios: deque[float] = deque(maxlen=_SHIFTED)
        spread = np.array([base, base / _FLAT_TOKENS, *[base / _FLAT_TOKENS / 2] * len(_KNEES), base / _FLAT_CONTEXT])
        self._widest = spread**2
        self._weights = np.zeros(len(spread))
        self._weights[0] = base
        self._kept: tuple[np.ndarray, np.ndarray] | None = None  # weights and covariance before steps that were far off
        self._covariance = np.diag(self._widest)
        for n, t in zip(tokens, seconds, strict=True):
            self._learn(_features(float(n), 0.0), float(t))
            self.largest = max(self.largest, float(n))

    def __call__(self, tokens: np.ndarray | float, context: float = 0.0) -> np.ndarray:
        """Seconds for each number of tokens; never falls with them. context: tokens that the step's rows read."""
        if self._at_edges is None:
            slopes = np.maximum(np.cumsum(self._weights[1:-1]), 0.0)
            self._at_edges = np.concatenate([[0.0], np.cumsum(slopes * _WIDTHS)])
        flat = max(self._weights[0] + max(self._weights[-1], 0.0) * context, 1e-9)
        return np.interp(np.atleast_1d(tokens), _EDGES, self._at_edges) + flat

    def observe(self, tokens: float, context: float, seconds: float) -> None:
        """Takes in one step."""
        features = _features(float(tokens), float(context))
        expected = max(float(features @ self._weights), 1e-9)
        before = self._ratios[-1] if self._ratios else 1.0
        self._ratios.append(seconds / expected)
        low, high = min(self._ratios), max(self._ratios)
        settled = self.seen > _SHIFTED
        if settled and len(self._ratios) == _SHIFTED and (low > _SHIFT or high < 1 / _SHIFT):
            # A machine that slows down slows everything, sizes included that are not tried now.
            factor = float(np.median(self._ratios))
            weights, covariance = self._kept or (self._weights, self._covariance)
            self._weights, self._covariance = weights * factor, covariance * factor**2
            self._widest = self._widest * factor**2
            self._ratios.clear()
            self._kept = None
            self._learn(features, seconds)
        elif settled and _off(seconds / expected) and _off(before) == _off(seconds / expected):
            pass  # perhaps another speed: the steps to come decide
        else:
            self._kept = None
            if settled and _off(seconds / expected):
                self._kept = (self._weights, self._covariance)
                seconds = min(max(seconds, expected / _OUTLIER), expected * _OUTLIER)
            self._learn(features, seconds)
        self.largest = max(self.largest, float(tokens))
        self.seen += 1

    def _learn(self, features: np.ndarray, seconds: float) -> None:
        self._at_edges = None
        forgotten = self._covariance / (1 - 1 / _MEMORY)
        # What no step tells of is forgotten without end otherwise.
        shrink = np.sqrt(np.minimum(1.0, self._widest / np.maximum(np.diag(forgotten), 1e-100)))
        forgotten = forgotten * shrink[:, None] * shrink
        spread = forgotten @ features
        gain = spread / (features @ spread + (_NOISE * seconds) ** 2)
        self._weights = self._weights + gain * (seconds - features @ self._weights)
        self._covariance = forgotten - np.outer(gain, spread)
        self._covariance = (self._covariance + self._covariance.T) / 2
        # Noise must not make a token free, nor context: the likeliest weights without falling slopes, nearly.
        for _ in range(3):
            falls = np.flatnonzero(_RISES @ self._weights < 0)
            for rise in _RISES[falls]:
                below = min(0.0, float(rise @ self._weights))
                moved = self._covariance @ rise
                self._weights = self._weights - moved * (below / max(float(rise @ moved), 1e-100))


def _off(ratio: float) -> int:
    """1 for a step that took far longer than expected, -1 for far shorter, 0 for neither."""
    return int(ratio > _OUTLIER) - int(ratio < 1 / _OUTLIER)


def _features(tokens: float, context: float) -> np.ndarray:
    return np.concatenate([[1.0, tokens], np.maximum(tokens - _KNEES, 0.0), [context]])
