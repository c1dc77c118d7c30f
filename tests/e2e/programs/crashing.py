"""What callers of the deployed App `crashing` are told."""

import time

import modal
from modal.exception import RemoteError


def failure(name: str) -> BaseException:
    try:
        modal.Cls.from_name("crashing", name)().answer.remote()
    except BaseException as error:
        return error
    raise AssertionError(f"{name} answered")


def run() -> None:
    raised = failure("Raises")
    assert isinstance(raised, FileNotFoundError), raised
    assert "there is no model" in str(raised)
    exited = failure("Exits")
    assert isinstance(exited, RemoteError), exited
    for part in ("could not start", "exit code 7", "the licence has expired"):
        assert part in str(exited), exited
    print("all is well")


def run_fixed() -> None:
    """At once, although the version before would wait before it tries again."""
    started_at = time.monotonic()
    assert modal.Cls.from_name("crashing", "Exits")().answer.remote() == 42
    print(f"answered after {time.monotonic() - started_at:.1f} s")
