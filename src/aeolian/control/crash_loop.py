"""Crash loops: containers of a pool that die before they do anything are started again later and later."""

NUM_FREE_TRIES = 3
"""So many are started one right after the other where inputs wait: the first deaths may be bad luck."""
MAX_PAUSE_S = 60.0
STABLE_S = 10.0
"""One that dies without an input is part of a loop unless it was up for so long."""


class CrashLoop:
    """::

    a container dies at its start --> pause --> one container is tried --> it finishes an input: all is well
             ^-------------------------------------- it dies as well ---'
    """

    def __init__(self) -> None:
        self.num_deaths = 0
        """In a row. Containers that were started side by side count as one."""
        self.not_before = 0.0
        """No container is started before this time, by the monotonic clock."""

    def died(self, attempt: int, now: float, *, is_awaited: bool) -> float:
        """A container died at its start. Returns for how long (seconds) no other one is started.

        `attempt`: how many had died when it was started. `is_awaited`: inputs wait for it.
        """
        if attempt < self.num_deaths:
            return max(0.0, self.not_before - now)
        self.num_deaths += 1
        is_free = is_awaited and self.num_deaths < NUM_FREE_TRIES
        pause_s = 0.0 if is_free else min(MAX_PAUSE_S, 2.0 ** min(self.num_deaths - 1, 10))
        self.not_before = now + pause_s
        return pause_s

    @property
    def gives_up(self) -> bool:
        """Whether those who wait are told that it does not work."""
        return self.num_deaths >= NUM_FREE_TRIES

    def reset(self) -> None:
        """A container has shown that it works, or what it runs has changed."""
        self.num_deaths, self.not_before = 0, 0.0
