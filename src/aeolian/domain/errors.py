"""Errors that users can cause. Each message says what was wrong, with what value, and what to do about it.

`protocol/errors.py` maps these types to gRPC codes and `gateway/errors.py` to HTTP statuses.
"""


class AeolianError(Exception):
    """Base of every error that is an answer, not a bug."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message


class NotFound(AeolianError):
    """No such object, or none that this caller may see."""


class ClassNameUsed(NotFound):
    """A Function was looked up by the name of a class."""


class AlreadyExists(AeolianError):
    """The name is taken."""


class InvalidArgument(AeolianError):
    """The request itself is malformed or asks for something impossible."""


class PayloadTooLarge(InvalidArgument):
    """More bytes came than allowed or announced."""


class Unauthenticated(AeolianError):
    """Missing or wrong credentials."""


class PermissionDenied(AeolianError):
    """The caller is known but may not do this."""


class FailedPrecondition(AeolianError):
    """The object is not in a state where this can be done."""


class ResourceExhausted(AeolianError):
    """A limit is reached; the same request may succeed later."""


class Unavailable(AeolianError):
    """Something needed is away for a moment; clients repeat the request."""


class DeadlineExceeded(AeolianError):
    """The time given for this ran out."""


class RequestStalled(DeadlineExceeded):
    """The client stopped sending in the middle of a request."""


class Unimplemented(AeolianError):
    """Aeolian does not do this (yet)."""


class OutOfSpace(ResourceExhausted):
    """The disk is full."""
