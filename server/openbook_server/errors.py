"""Every failure a caller or an operator can meet, each with the gRPC status it becomes.

A request is admitted (NotServing, ReadOnly, NoKnowledgeBase), parsed and validated (InvalidRequest, MessageTooLarge, NotInBundle), queued
(Overloaded, DeadlineExceeded), then inferred (InferenceFailed). Before that, at start: a bundle is loaded (BundleInvalid), a device is
opened (DeviceUnavailable), a knowledge base is opened (KnowledgeBaseLocked, KnowledgeBaseDamaged, KnowledgeBaseUnavailable,
KnowledgeBaseRefused, FingerprintMismatch), sources are read (SourceInvalid), and a generation is built from stored passages
(PassageTooLong) and published (GenerationNotReady), perhaps by another process (GenerationReplaced).
`reason` is stable and goes into google.rpc.ErrorInfo; the message names the value, the limit and the way out.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class OpenBookError(Exception):
    """Root: everything here is a failure with a message fit for the user; nothing else may reach one."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"


class InvalidRequest(OpenBookError):
    """A field of the request is wrong; sending it again unchanged is pointless."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.description = message


class MessageTooLarge(InvalidRequest):
    """A message, or what would reply to it, holds more than the server allows; one with fewer texts may be served."""

    reason = "MESSAGE_TOO_LARGE"


class Overloaded(OpenBookError):
    """The queue is full, or the deadline cannot be met; back off `retry_after_seconds` and try again."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ReadOnly(OpenBookError):
    """A write to a server that takes none."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "READ_ONLY"

    def __init__(self) -> None:
        super().__init__("this server takes no writes: it was started with --read-only, or listens to other machines without --writable")


class NotServing(OpenBookError):
    """The server is still starting, or already shutting down; another one, or this one later, may take the request."""

    status = grpc.StatusCode.UNAVAILABLE
    reason = "NOT_SERVING"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(OpenBookError):
    """The caller's deadline passed while its request waited."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class InferenceFailed(OpenBookError):
    """onnxruntime failed on a batch; the message holds its own words, never the caller's text."""

    reason = "INFERENCE_FAILED"


class NotInBundle(OpenBookError):
    """The request needs a model that the server's bundle has not."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "NOT_IN_BUNDLE"


class NoKnowledgeBase(OpenBookError):
    """The request needs a knowledge base, and the server was started without one."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "NO_KNOWLEDGE_BASE"

    def __init__(self, otherwise: str = "") -> None:
        super().__init__(f"this server has no knowledge base; start it as `openbook serve BUNDLE KB`{otherwise}")


class BundleInvalid(OpenBookError):
    """The bundle is missing, truncated, tampered with, of a newer format, or fails its golden vectors."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "BUNDLE_INVALID"


class DeviceUnavailable(OpenBookError):
    """No onnxruntime, two of them, or none that drives the device asked for."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "DEVICE_UNAVAILABLE"


class KnowledgeBaseLocked(OpenBookError):
    """Another process has the knowledge base open."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "KNOWLEDGE_BASE_LOCKED"


class KnowledgeBaseDamaged(OpenBookError):
    """The knowledge base is missing, of a newer format, or its SQLite file fails its check."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "KNOWLEDGE_BASE_DAMAGED"


class KnowledgeBaseUnavailable(OpenBookError):
    """The machines that hold the knowledge base, or some of them, do not answer, or its file is locked; the same request later may
    succeed."""

    status = grpc.StatusCode.UNAVAILABLE
    reason = "KNOWLEDGE_BASE_UNAVAILABLE"
    retry_after_seconds = 5.0


class KnowledgeBaseRefused(OpenBookError):
    """The machines that hold the knowledge base will not serve us until an operator acts: user, version, full disk."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "KNOWLEDGE_BASE_REFUSED"


class FingerprintMismatch(OpenBookError):
    """The knowledge base was built by another embedder than the bundle's."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "FINGERPRINT_MISMATCH"


class GenerationNotReady(OpenBookError):
    """A generation cannot be built or published, not while another one is, or there is none to go back to."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "GENERATION_NOT_READY"


class GenerationReplaced(OpenBookError):
    """Another process made another generation live: what this one writes would not be found. Nothing was written; a server follows."""

    status = grpc.StatusCode.UNAVAILABLE
    reason = "GENERATION_REPLACED"
    retry_after_seconds = 5.0


class PassageTooLong(OpenBookError):
    """A stored passage is longer than another bundle's models read; its document must be split again."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "PASSAGE_TOO_LONG"


class SourceInvalid(OpenBookError):
    """A source cannot be read at all (a damaged file among good ones is skipped and counted instead)."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "SOURCE_INVALID"
