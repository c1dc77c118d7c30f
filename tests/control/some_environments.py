"""What services of named objects need around them, small."""

from typing import NamedTuple

from aeolian.domain.caller import Caller
from aeolian.domain.clock import SystemClock

ME = Caller(workspace="local", token_id="ak-1", sdk_version="1.6.4")
STRANGER = Caller(workspace="elsewhere", token_id="ak-2")


class SomeEnvironment(NamedTuple):
    id: str
    name: str


class SomeEnvironments:
    """Any name is an environment."""

    def resolve(self, name: str, caller: Caller) -> SomeEnvironment:
        return SomeEnvironment(f"en-{name or 'main'}", name or "main")


class ShiftedClock(SystemClock):
    """The real time, and what a test adds to it."""

    def __init__(self) -> None:
        self.shift_s = 0.0

    def now(self) -> float:
        return super().now() + self.shift_s

    def advance(self, seconds: float) -> None:
        self.shift_s += seconds
