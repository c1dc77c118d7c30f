from hypothesis import given
from hypothesis import strategies as st

from aeolian.control.crash_loop import MAX_PAUSE_S, CrashLoop


def deaths(loop: CrashLoop, count: int, *, is_awaited: bool) -> list[float]:
    """The pauses after containers that are started one by one and die."""
    return [loop.died(loop.num_deaths, 100.0, is_awaited=is_awaited) for _ in range(count)]


def test_pauses_double_up_to_a_limit():
    assert deaths(CrashLoop(), 8, is_awaited=False) == [1, 2, 4, 8, 16, 32, 60, 60]


def test_where_inputs_wait_the_first_ones_follow_at_once_and_then_their_callers_are_told():
    loop = CrashLoop()
    assert deaths(loop, 2, is_awaited=True) == [0, 0]
    assert not loop.gives_up
    assert deaths(loop, 1, is_awaited=True) == [4]
    assert loop.gives_up


def test_containers_that_were_started_side_by_side_count_as_one():
    loop = CrashLoop()
    pauses = [loop.died(0, 100.0 + n, is_awaited=False) for n in range(3)]
    assert loop.num_deaths == 1
    assert pauses == [1, 0, 0]
    assert loop.not_before == 101.0


def test_what_works_is_started_at_once():
    loop = CrashLoop()
    deaths(loop, 5, is_awaited=True)
    loop.reset()
    assert loop.not_before == 0.0
    assert not loop.gives_up


@given(st.integers(1, 10_000), st.booleans())
def test_a_pause_never_passes_the_limit(count, is_awaited):
    assert max(deaths(CrashLoop(), count, is_awaited=is_awaited)) <= MAX_PAUSE_S
