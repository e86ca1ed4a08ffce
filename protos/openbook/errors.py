"""Every way a call can fail, one class for each thing a caller can do differently.

A request is wrong (RequestRejected: mend it), the server is not there (ServerUnavailable: start it, try another), too busy
(ServerOverloaded: come back later), too slow (DeadlineExceeded: allow more time), or broken (ServerFailed: report it).
"""

from __future__ import annotations

import re
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

TOO_LARGE = "MESSAGE_TOO_LARGE"  # the reason of a refusal that blames how much a message holds, or its reply: half of it may be taken
_TOO_LARGE = "larger than max"  # says gRPC itself, without details, of a message above its limit; of all else it is out of, something else
_PLACE = re.compile(r"(\w+)\[(\d+)\](.*)", re.DOTALL)


class ClientError(Exception):
    """Root: the message is fit for a user."""


class RequestRejected(ClientError):
    """The server, or the client before sending, found the request wrong; unchanged it will be refused again."""

    def __init__(self, message: str, *, field: str = "", reason: str = "INVALID_REQUEST") -> None:
        super().__init__(f"{field}: {message}" if field and not message.startswith(field) else message)
        self.field = field  # e.g. "questions[3]" or "top_k"
        self.reason = reason  # stable, for programs
        self._message = message

    @property
    def has_place(self) -> bool:
        """Whether it blames one of several texts, or what belongs to it."""
        return bool(_PLACE.match(self.field))

    def moved(self, places: int) -> RequestRejected:
        """As told of a list of which the message held a later part: `texts[3]` is `texts[35]` where 32 went before."""
        found = _PLACE.match(self.field)
        if not found:
            return self
        name, at, rest = found.groups()
        field = f"{name}[{int(at) + places}]{rest}"
        return RequestRejected(self._message.removeprefix(f"{self.field}: "), field=field, reason=self.reason)


class ServerUnavailable(ClientError):
    """No server there, or it is starting or shutting down."""


class ServerOverloaded(ClientError):
    """The server's queue is full and stayed so until the deadline."""


class DeadlineExceeded(ClientError):
    """No answer within the time allowed."""


class ServerFailed(ClientError):
    """A failure inside the server; its log has more."""


def from_rpc(error: Any, address: str, timeout_seconds: float) -> tuple[ClientError, float | None]:
    """A failed call as a ClientError, and the delay in seconds the server asked for (None where it asked for none).

    `error` is the grpc.RpcError of a call, sync or async: both have `code()`, `details()` and trailing metadata.
    """
    code, details = error.code(), error.details() or ""
    status = rpc_status.from_call(error)
    reason, field, delay = "", "", None
    for detail in status.details if status is not None else ():
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            field, details = bad.field_violations[0].field, bad.field_violations[0].description
        elif detail.Unpack(retry):
            delay = retry.retry_delay.ToNanoseconds() / 1e9
    if code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.OUT_OF_RANGE}:
        return RequestRejected(details, field=field, reason=reason or code.name), None
    if code is grpc.StatusCode.UNAVAILABLE:
        said = details if reason else f"no server at {address}; start one with `openbook serve BUNDLE KB`, or name another's HOST:PORT"
        return ServerUnavailable(said), delay
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if not reason and _TOO_LARGE in details:
            return RequestRejected(details, field="request", reason=TOO_LARGE), None
        return ServerOverloaded(details), delay
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        said = f" ({details})" if reason else ""
        return DeadlineExceeded(f"no answer from {address} within {timeout_seconds:g} s{said}; allow more time"), None
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return RequestRejected(f"{address} does not serve openbook.v1 ({details})", reason="UNIMPLEMENTED"), None
    return ServerFailed(f"{address} failed: {code.name} {details}"), None
