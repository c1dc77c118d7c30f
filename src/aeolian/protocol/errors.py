"""The one table that turns errors into gRPC codes.

Clients repeat UNKNOWN, INTERNAL, UNAVAILABLE, CANCELLED and DEADLINE_EXCEEDED up to four times, so a bug of
ours must answer something else, or a failing write is executed four times.
"""

import grpc
from modal_proto import api_pb2

from aeolian.domain import errors

CODES: dict[type[errors.AeolianError], grpc.StatusCode] = {
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.OutOfSpace: grpc.StatusCode.FAILED_PRECONDITION,  # RESOURCE_EXHAUSTED would be repeated for ever
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
}

BUG = grpc.StatusCode.ABORTED
"""For exceptions that nobody expected: clients show it and do not repeat the request."""


MAX_MESSAGE_BYTES = 2500
"""Three times as many when they are percent-encoded; 8 KiB of headers is the least that a client may take."""


def code_of(error: errors.AeolianError) -> grpc.StatusCode:
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return BUG


def message_of(error: errors.AeolianError) -> str:
    """What the caller is told: no more than fits into the headers that clients accept."""
    raw = error.message.encode(errors="replace")
    if len(raw) <= MAX_MESSAGE_BYTES:
        return error.message
    return f"{raw[:MAX_MESSAGE_BYTES].decode(errors='ignore')}… (cut: {len(raw):,} bytes in all)"


def details_of(error: errors.AeolianError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata for the errors that clients tell apart by more than their code."""
    if not isinstance(error, errors.ClassNameUsed):
        return ()
    status = api_pb2.RPCStatus(code=code_of(error).value[0], message=message_of(error))
    reason = api_pb2.FunctionLookupError(reason=api_pb2.FunctionLookupError.REASON_CLASS_NAME_USED)
    status.details.add().Pack(reason)
    return (("grpc-status-details-bin", status.SerializeToString()),)
