"""When a failed call is tried again: while the server is unavailable or overloaded and time is left.

The delay is the one that the server asked for, or grows from try to try. A server that has never answered is not waited for: it is not
there, more likely than starting again. A call that must not be made twice is tried again only where the server refused to begin it.
"""

from __future__ import annotations

import random
import time

import grpc

from openbook.errors import ClientError, DeadlineExceeded, ServerOverloaded, ServerUnavailable, from_rpc

_FIRST_DELAY, _LONGEST_DELAY = 0.05, 2.0  # seconds between tries where the server names none
_UNREACHABLE_TRIES = 3  # at a server that has never answered


class Attempts:
    """Decides, after each failure of a call, whether and when to try again."""

    def __init__(self, address: str, timeout_seconds: float, *, answered: bool = False, repeatable: bool = True) -> None:
        """Args:
        timeout_seconds: for all tries together.
        answered: whether this server has answered before.
        repeatable: whether a call that may have been made can be made again.
        """
        self._address, self._timeout, self._answered, self._repeatable = address, timeout_seconds, answered, repeatable
        self._deadline = time.monotonic() + timeout_seconds
        self._failed = 0
        self._refused: ClientError | None = None  # why the call before did not succeed

    @property
    def seconds_left(self) -> float:
        return max(1e-3, self._deadline - time.monotonic())

    def delay_after(self, failure: grpc.RpcError, *, again: bool = True) -> float:
        """Seconds to wait before the next try; `again`: whether there may be one.

        Raises:
            ClientError: there will be none.
        """
        error, asked = from_rpc(failure, self._address, self._timeout)
        self._failed += 1
        refused = isinstance(error, ServerOverloaded)
        patience = refused or asked is not None or self._answered or self._failed < _UNREACHABLE_TRIES
        delay = asked if asked is not None else min(_LONGEST_DELAY, _FIRST_DELAY * 2**self._failed)
        delay *= random.uniform(1.0, 1.5)  # callers that were refused together shall not come back together
        again = again and (refused or (self._repeatable and isinstance(error, ServerUnavailable)))
        if isinstance(error, DeadlineExceeded) and self._refused is not None:  # more time would not have helped
            error = type(self._refused)(f"{self._refused}; tried again, and no answer came within the {self._timeout:g} s")
        if not again or not patience or delay >= self.seconds_left:
            raise error from failure
        self._refused = error
        return delay
