"""One pool of containers in virtual time: inputs queue, containers start, work, wait and end, as a policy says.

Inputs do not slow one another down; starts do: they share the cores, as they are little else than work for them.
"""

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from traces import Arrival, Trace

from aeolian.control import autoscaler
from aeolian.control.autoscaling import BUSY_TICK_S
from aeolian.control.pools import AVERAGE_SHARE

INITIAL_START_S = 0.3
"""What a pool believes of a start before it has seen one."""


@dataclass(eq=False)
class SimContainer:
    task_id: str
    asked_at: float
    ready_at: float = 0.0
    """0 while it starts."""
    held: dict[int, float] = field(default_factory=dict)
    """Input -> when it began."""
    idle_since: float = 0.0
    num_taken: int = 0
    is_ending: bool = False
    ended_at: float | None = None


class Sample(NamedTuple):
    at: float
    num_containers: int
    num_queued: int


class Policy(Protocol):
    name: str

    def decide(self, pool: "SimPool", now: float) -> tuple[int, list[SimContainer]]:
        """How many containers to start, and which to end. Asked after each event, and when it wants to be."""
        ...

    def next_look(self, pool: "SimPool", now: float) -> float | None:
        """When it wants to be asked although nothing has happened."""
        ...


class Outcome(NamedTuple):
    trace: str
    policy: str
    container_s: float
    waits: list[float]
    """How long each input waited before a container began with it, in order of arrival."""
    num_starts: int
    num_needless: int
    """Containers that ended without an input."""
    most: int
    samples: list[Sample]
    num_left: int
    """Containers that are still there at the end of the trace."""

    def wait_at(self, share: float) -> float:
        """The wait that this share of the inputs does not exceed."""
        ordered = sorted(self.waits)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class SimPool:
    """The state of the pool, as policies may look at it."""

    def __init__(self, trace: Trace, num_cores: int, start_s: float, slots: int):
        self.num_cores = num_cores
        self.slots = slots
        self.queue: deque[int] = deque()
        self.containers: dict[str, SimContainer] = {}
        self.input_s: float | None = None
        self.start_s = INITIAL_START_S
        self._trace = trace
        self._start_s = start_s
        self._events: list[tuple[float, int, str, object]] = []
        self._order = itertools.count()
        self._names = itertools.count(1)
        self._began: list[float | None] = [None] * len(trace.arrivals)
        self._ended: list[SimContainer] = []
        self._samples: list[Sample] = []
        self.most_at_once = 0

    # ---- what a policy sees -----------------------------------------------------------------------------

    @property
    def starting(self) -> list[SimContainer]:
        return [container for container in self.containers.values() if not container.ready_at]

    @property
    def ready(self) -> list[SimContainer]:
        return [c for c in self.containers.values() if c.ready_at and not c.is_ending]

    @property
    def ending(self) -> list[SimContainer]:
        return [container for container in self.containers.values() if container.is_ending]

    @property
    def num_running(self) -> int:
        return sum(len(container.held) for container in self.containers.values())

    def expected_input_s(self, now: float) -> float:
        """As `autoscaling` sees it."""
        began = (at for container in self.ready for at in container.held.values())
        return autoscaler.expected_input_s(self.input_s, now - min(began, default=now))

    # ---- its life ---------------------------------------------------------------------------------------

    def run(self, policy: Policy) -> Outcome:
        for number, arrival in enumerate(self._trace.arrivals):
            self._later(arrival.at, "arrival", number)
        look: float | None = 0.0
        now = 0.0
        while now < self._trace.length_s:
            event_at = self._events[0][0] if self._events else self._trace.length_s
            now = min(event_at, self._trace.length_s, look if look is not None else self._trace.length_s)
            while self._events and self._events[0][0] <= now:
                _, _, kind, subject = heapq.heappop(self._events)
                getattr(self, f"_{kind}")(subject, now)
            self._dispatch(now)
            num_to_start, to_end = policy.decide(self, now)
            for container in to_end:
                self._end(container, now)
            for _ in range(num_to_start):
                self._start(now)
            look = policy.next_look(self, now)
            if look is not None:
                look = max(look, now + 1e-6)
            self._note(now)
        return self._outcome(policy, now)

    def _arrival(self, number: int, now: float) -> None:
        self.queue.append(number)

    def _start(self, now: float) -> None:
        container = SimContainer(f"ta-{next(self._names)}", now)
        self.containers[container.task_id] = container
        self._later(now + self._start_s * max(1.0, len(self.starting) / self.num_cores), "started", container)

    def _started(self, container: SimContainer, now: float) -> None:
        if container.ended_at is None:
            container.ready_at = container.idle_since = now
            self.start_s += 0.5 * (now - container.asked_at - self.start_s)

    def _finished(self, done: tuple[SimContainer, int], now: float) -> None:
        container, number = done
        took = now - container.held.pop(number)
        self.input_s = took if self.input_s is None else self.input_s + AVERAGE_SHARE * (took - self.input_s)
        if not container.held:
            container.idle_since = now
            if container.is_ending:
                self._remove(container, now)

    def _dispatch(self, now: float) -> None:
        """Inputs go to whom has fewest, of those the one that became idle last."""
        while self.queue:
            free = [container for container in self.ready if len(container.held) < self.slots]
            if not free:
                return
            container = max(free, key=lambda container: (-len(container.held), container.idle_since))
            number = self.queue.popleft()
            container.held[number] = self._began[number] = now
            container.num_taken += 1
            arrival: Arrival = self._trace.arrivals[number]
            self._later(now + arrival.duration_s, "finished", (container, number))

    def _end(self, container: SimContainer, now: float) -> None:
        """What it works on is finished first."""
        container.is_ending = True
        if not container.held:
            self._remove(container, now)

    def _remove(self, container: SimContainer, now: float) -> None:
        container.ended_at = now
        del self.containers[container.task_id]
        self._ended.append(container)

    def _later(self, at: float, kind: str, subject: object) -> None:
        heapq.heappush(self._events, (at, next(self._order), kind, subject))

    def _note(self, now: float) -> None:
        self.most_at_once = max(self.most_at_once, len(self.containers))
        sample = Sample(now, len(self.containers), len(self.queue))
        if not self._samples or self._samples[-1][1:] != sample[1:]:
            self._samples.append(sample)

    def _outcome(self, policy: Policy, now: float) -> Outcome:
        everyone = [*self._ended, *self.containers.values()]
        arrivals = self._trace.arrivals
        return Outcome(
            trace=self._trace.name,
            policy=policy.name,
            container_s=sum((now if c.ended_at is None else c.ended_at) - c.asked_at for c in everyone),
            waits=[(now if at is None else at) - arrivals[n].at for n, at in enumerate(self._began)],
            num_starts=len(everyone),
            num_needless=sum(not container.num_taken for container in everyone),
            most=self.most_at_once,
            samples=[*self._samples, Sample(now, len(self.containers), len(self.queue))],
            num_left=len(self.containers),
        )


def simulate(trace: Trace, policy: Policy, *, num_cores: int = 8, start_s: float = 0.3, slots: int = 1) -> Outcome:
    """Replay a trace through a policy."""
    return SimPool(trace, num_cores, start_s, slots).run(policy)


__all__ = ["BUSY_TICK_S", "Outcome", "Policy", "SimContainer", "SimPool", "simulate"]
