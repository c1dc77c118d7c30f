"""Loads to scale for: when inputs arrive, and how long each takes. The same ones in every run."""

import math
import random
from collections.abc import Iterator
from typing import NamedTuple


class Arrival(NamedTuple):
    at: float
    duration_s: float


class Trace(NamedTuple):
    name: str
    arrivals: list[Arrival]
    length_s: float
    """Until when its containers are watched and paid for."""
    zoom: tuple[float, float]
    """The part in which the queue is worth a look."""


def steady(rate: float = 20.0, duration_s: float = 0.3, length_s: float = 600.0, seed: int = 1) -> Trace:
    """Independent users, all the time."""
    rng = random.Random(seed)
    return Trace(
        "steady", list(_poisson(rng, lambda at: rate, rate, duration_s, length_s)), length_s + 120.0, (0.0, 60.0)
    )


def burst(num_inputs: int = 1000, duration_s: float = 0.1, seed: int = 2) -> Trace:
    """Somebody maps over a thousand things, and again when everything has come to rest."""
    rng = random.Random(seed)
    arrivals = [Arrival(at, _spread(rng, duration_s)) for at in (10.0, 200.0) for _ in range(num_inputs)]
    return Trace(f"burst of {duration_s * 1000:.0f} ms", arrivals, 400.0, (9.5, 14.0))


def diurnal(peak_rate: float = 4.0, duration_s: float = 1.0, length_s: float = 7200.0, seed: int = 3) -> Trace:
    """Two days, an hour each: quiet at night, up to `peak_rate` inputs a second at noon."""
    rng = random.Random(seed)

    def rate(at: float) -> float:
        return peak_rate * max(0.0, math.sin(2 * math.pi * at / (length_s / 2) - math.pi / 2)) ** 2

    return Trace(
        "diurnal", list(_poisson(rng, rate, peak_rate, duration_s, length_s)), length_s + 120.0, (0.0, length_s)
    )


def thundering_herd(num_inputs: int = 200, duration_s: float = 1.0, every_s: float = 90.0, seed: int = 4) -> Trace:
    """Clients whose timers fire at the same moment, within a tenth of a second of each other."""
    rng = random.Random(seed)
    arrivals = [
        Arrival(at + rng.random() * 0.1, _spread(rng, duration_s))
        for at in (5.0 + number * every_s for number in range(6))
        for _ in range(num_inputs)
    ]
    return Trace("thundering herd", sorted(arrivals), 6 * every_s + 60.0, (4.5, 10.5))


def all_traces() -> list[Trace]:
    return [steady(), burst(), burst(duration_s=0.005), diurnal(), thundering_herd()]


def _poisson(rng: random.Random, rate, peak_rate: float, duration_s: float, length_s: float) -> Iterator[Arrival]:
    """Arrivals with a rate that changes, by thinning those of the highest rate."""
    at = 0.0
    while (at := at + rng.expovariate(peak_rate)) < length_s:
        if rng.random() * peak_rate < rate(at):
            yield Arrival(at, _spread(rng, duration_s))


def _spread(rng: random.Random, duration_s: float) -> float:
    """Most take about as long as the others, some much longer."""
    return duration_s * rng.lognormvariate(-0.125, 0.5)
