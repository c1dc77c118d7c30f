"""How a process of Aeolian ends on an error that is an answer: its message alone, and a status that the supervisor
understands."""

import contextlib
import os
import sys
from collections.abc import Iterator

from aeolian.domain.errors import AeolianError, FailedPrecondition, InvalidArgument


@contextlib.contextmanager
def errors_end_the_process() -> Iterator[None]:
    try:
        yield
    except (InvalidArgument, FailedPrecondition) as error:
        print(error.message, file=sys.stderr)
        sys.exit(os.EX_CONFIG)  # the supervisor does not try again
    except AeolianError as error:
        print(error.message, file=sys.stderr)
        sys.exit(1)
