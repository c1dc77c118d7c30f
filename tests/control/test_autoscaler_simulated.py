"""The autoscaler over time, by the simulator of `benchmarks/autoscaler`."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "autoscaler"))

from policies import Aeolian, Knative, QueueLength
from simulation import SimContainer, SimPool, simulate
from traces import Arrival, Trace, all_traces, burst, thundering_herd


class Watched(Aeolian):
    """Checks each decision before it is carried out."""

    def __init__(self, max_containers: int = 0):
        super().__init__(max_containers=max_containers)
        self._max_containers = max_containers

    def decide(self, pool: SimPool, now: float) -> tuple[int, list[SimContainer]]:
        num_to_start, to_end = super().decide(pool, now)
        assert not [container for container in to_end if container.held], "one that works was ended"
        if self._max_containers:
            assert len(pool.containers) + num_to_start <= self._max_containers
        return num_to_start, to_end


@st.composite
def traces(draw) -> Trace:
    arrivals = draw(st.lists(st.builds(Arrival, st.floats(0, 100), st.floats(0.001, 20)), max_size=60))
    return Trace("any", sorted(arrivals), 2000.0, (0.0, 2000.0))


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(0, 5), st.integers(1, 16), st.integers(1, 4), st.floats(0.05, 5.0))
def test_every_load_is_served_within_the_limits_and_ends_at_zero(trace, max_containers, num_cores, slots, start_s):
    outcome = simulate(trace, Watched(max_containers), num_cores=num_cores, slots=slots, start_s=start_s)
    assert outcome.num_left == 0
    assert not outcome.samples[-1].num_queued
    assert outcome.num_starts <= max(1, len(trace.arrivals))
    if max_containers:
        assert outcome.most <= max_containers


@pytest.mark.parametrize("duration_s", [0.003, 0.1, 1.0, 10.0])
def test_a_burst_of_a_thousand_neither_starts_a_crowd_nor_starves(duration_s):
    trace = burst(1000, duration_s)
    ours, greedy = simulate(trace, Watched()), simulate(trace, QueueLength())
    assert ours.num_needless <= 0.25 * ours.num_starts
    assert ours.num_starts <= 0.6 * greedy.num_starts or duration_s >= 10
    assert ours.wait_at(0.95) <= 1.5 * greedy.wait_at(0.95) + 1.0


@pytest.mark.parametrize("trace", all_traces(), ids=lambda trace: trace.name)
def test_nobody_waits_longer_than_with_knative_and_fewer_containers_are_started(trace):
    ours, theirs = simulate(trace, Watched()), simulate(trace, Knative())
    for share in (0.5, 0.95, 1.0):
        assert ours.wait_at(share) <= theirs.wait_at(share) + 0.01
    assert ours.num_starts < theirs.num_starts
    assert ours.num_needless <= theirs.num_needless


def test_a_minimum_and_a_buffer_are_there_before_the_herd():
    trace = thundering_herd(num_inputs=5)
    cold = simulate(trace, Watched())
    warm = simulate(trace, Aeolian(min_containers=5))
    assert warm.num_left == 5
    assert warm.wait_at(0.95) == 0.0 < cold.wait_at(0.95)
    assert simulate(trace, Aeolian(buffer_containers=3)).most == 8
