"""How long a batch will take: a cost law of one graph on this machine, learned while it serves.

A BERT's batch costs something whatever it holds (dispatch, kernel launches), something a token (matrix products), and something a pair
of tokens of one row (attention): seconds = a + b · tokens + c · tokens · length, none of them negative. On a GPU a single
short row is almost all `a`, on a processor a full batch almost all `b`: seconds a token alone would be wrong for one of them.

Fitted by least squares of the relative error, old batches counting less and less. A batch that was held up by something
else on the machine weighs little there, because its relative error is measured against its own long time: the law is that of
the undisturbed machine. What disturbs it is a factor on top, the mean of observed over fitted, for waits are sums. It is of the latest
work, not of the latest batches, for under load a batch may hold a hundred times what it holds else.
"""

from __future__ import annotations

import math
import sys

_MEMORY = 0.98  # of a batch's weight is left after the next one: about the last fifty count
_SWEEPS = 3  # of coordinate descent a batch; it starts from the last fit, so few are enough
_LATEST = 0.5  # seconds of undisturbed work that the factor is mostly of
_LONGEST = 10.0  # times the fitted seconds: longer counts as this, so that one stall does not close the server
_UNITS = (1e-3, 1.0, 1e-5)  # make the three features about equally large


class BatchCost:
    """The cost law of one graph; zero until the first batch was learned."""

    def __init__(self) -> None:
        self._law = [0.0, 0.0, 0.0]  # of tokens, batches, tokens · length: the first explains the first batch alone
        self._factor = 1.0
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._products = [0.0, 0.0, 0.0]

    def learn(self, rows: int, length: int, seconds: float) -> None:
        """A batch of `rows` rows padded to `length` tokens took so long."""
        seconds = max(seconds, 1e-6)
        features, weight = _features(1, rows, length), 1 / seconds**2
        for i, one in enumerate(features):
            for j, other in enumerate(features):
                self._squares[i][j] = _MEMORY * self._squares[i][j] + weight * one * other
            self._products[i] = _MEMORY * self._products[i] + weight * one * seconds
        for _ in range(_SWEEPS):
            for i in range(3):
                others = sum(self._squares[i][j] * self._law[j] for j in range(3) if j != i)
                self._law[i] = max(0.0, (self._products[i] - others) / self._squares[i][i])
        fitted = self.predict(1, rows, length) / self._factor
        kept = math.exp(-fitted / _LATEST)
        self._factor = kept * self._factor + (1 - kept) * min(seconds / fitted, _LONGEST)

    def predict(self, batches: int, rows: int, length: int) -> float:
        """Seconds for `rows` rows of one padded length, run in so many batches."""
        (a_token, a_batch, a_pair), (tokens, count, pairs) = self._law, _features(batches, rows, length)
        return self._factor * (a_token * tokens + a_batch * count + a_pair * pairs)

    def rows_within(self, seconds: float, length: int) -> int:
        """Rows of one padded length that a batch of `seconds` holds; sys.maxsize where nothing was learned."""
        (a_token, a_batch, a_pair), (tokens, count, pairs) = self._law, _features(1, 1, length)
        a_row = a_token * tokens + a_pair * pairs
        left = seconds / self._factor - a_batch * count
        return max(0, int(min(left / a_row, sys.maxsize))) if a_row else sys.maxsize


def _features(batches: int, rows: int, length: int) -> tuple[float, float, float]:
    tokens = rows * length
    return _UNITS[0] * tokens, _UNITS[1] * batches, _UNITS[2] * tokens * length
