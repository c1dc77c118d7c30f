"""The one table that turns errors into HTTP statuses. Bodies are one line of JSON, never a traceback."""

import logging
import secrets

from aiohttp import web

from aeolian.domain import errors
from aeolian.storage.receive import disk_error

log = logging.getLogger(__name__)

STATUSES: dict[type[errors.AeolianError], int] = {
    errors.NotFound: 404,
    errors.AlreadyExists: 409,
    errors.InvalidArgument: 400,
    errors.PayloadTooLarge: 413,
    errors.Unauthenticated: 401,
    errors.PermissionDenied: 403,
    errors.FailedPrecondition: 412,
    errors.ResourceExhausted: 429,
    errors.OutOfSpace: 507,
    errors.Unavailable: 503,
    errors.RequestStalled: 408,
    errors.DeadlineExceeded: 504,
    errors.Unimplemented: 501,
}


def status_of(error: errors.AeolianError) -> int:
    for kind in type(error).__mro__:
        if kind in STATUSES:
            return STATUSES[kind]
    return 500


@web.middleware
async def answer_errors(request: web.Request, handler) -> web.StreamResponse:
    """Every request ends in one reply; what nobody expected is logged under a reference that the reply names."""
    try:
        return await handler(request)
    except errors.AeolianError as error:
        return error_response(status_of(error), error.message)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_response(error.status, f"{request.method} {request.path}: {error.reason}")
    except (ConnectionError, web.RequestPayloadError):
        # The peer went away, or broke off in the middle of its body: nobody reads this.
        return error_response(400, "the request broke off")
    except Exception as error:
        if isinstance(error, OSError) and isinstance(disk := disk_error(error), errors.OutOfSpace):
            return error_response(507, disk.message)
        reference = secrets.token_hex(4)
        log.exception("bug in %s %s (reference %s)", request.method, request.path, reference)
        return error_response(500, f"this is a bug in Aeolian (reference {reference} in its log)")


def error_response(status: int, message: str) -> web.Response:
    response = web.json_response({"error": message}, status=status)
    if status >= 400 and status != 404:
        response.force_close()  # the rest of a refused body is not worth reading
    return response
