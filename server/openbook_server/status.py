"""Errors as gRPC statuses with google.rpc details."""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from openbook_server.errors import GenerationReplaced, InvalidRequest, KnowledgeBaseUnavailable, NotServing, OpenBookError, Overloaded

DOMAIN = "openbook"
MAX_MESSAGE_BYTES = 1_024  # of one text: three times, percent-encoded and in base64, below the 8 KB that clients read of a status


def grpc_status(error: OpenBookError) -> grpc.Status:
    """The status for `context.abort_with_status`: code, message, and details in grpc-status-details-bin."""
    details: list[Message] = [ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if isinstance(error, InvalidRequest):
        violation = BadRequest.FieldViolation(field=error.field, description=_shortened(error.description))
        details.append(BadRequest(field_violations=[violation]))
    if isinstance(error, Overloaded | NotServing | KnowledgeBaseUnavailable | GenerationReplaced):
        delay = Duration()
        delay.FromNanoseconds(int(1e9 * error.retry_after_seconds))
        details.append(RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(AnyMessage())
        packed[-1].Pack(detail)
    status: grpc.Status = rpc_status.to_status(Status(code=error.status.value[0], message=_shortened(str(error)), details=packed))
    return status


def _shortened(text: str) -> str:
    """Without its middle where it is too long: what a request names may be quoted in it, and how to go on stands at its end."""
    data = text.encode(errors="backslashreplace")
    if len(data) <= MAX_MESSAGE_BYTES:
        return data.decode()
    half = MAX_MESSAGE_BYTES // 2
    begin, end = data[:half].decode(errors="ignore"), data[-half:].decode(errors="ignore")
    return f"{begin} [{len(data) - 2 * half} bytes left out] {end}"
