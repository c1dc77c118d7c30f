import pytest
from hypothesis import given
from hypothesis import strategies as st

from aeolian.control.autoscaler import PoolPlan, PoolView, concurrency, expected_input_s, plan

NOW = 1000.0


def pool(**changes) -> PoolView:
    view = PoolView(
        num_queued=0,
        num_running_inputs=0,
        slots=1,
        num_above_target=0,
        num_starting=0,
        num_ready=0,
        num_blocked=0,
        num_ending=0,
        num_finishing=0,
        idle=(),
        busy=(),
        input_s=0.05,
        start_s=0.3,
        min_containers=0,
        max_containers=0,
        buffer_containers=0,
        scaledown_window_s=60.0,
    )
    return view._replace(**changes)


@pytest.mark.parametrize(
    ("view", "start"),
    [
        pytest.param(pool(), 0, id="nothing to do"),
        pytest.param(pool(num_queued=1), 1, id="the first input starts a container"),
        pytest.param(pool(num_queued=1, num_starting=1), 0, id="one that is starting will take it"),
        pytest.param(pool(num_queued=100, input_s=0.001), 2, id="short inputs get a container for each core"),
        pytest.param(pool(num_queued=100, num_ready=2, input_s=0.001), 0, id="and no more"),
        pytest.param(pool(num_queued=100, num_ready=2, input_s=1.0), 2, id="long ones get twice as many each time"),
        pytest.param(pool(num_queued=100, num_ready=8, input_s=1.0), 8, id="doubled again"),
        pytest.param(
            pool(num_queued=100, num_ready=2, num_starting=2, input_s=1.0), 0, id="only once the last ones are there"
        ),
        pytest.param(pool(num_queued=100, num_starting=2, input_s=1.0), 0, id="or the very first ones"),
        pytest.param(pool(num_queued=3, num_ready=8, input_s=100.0), 3, id="never more than inputs wait"),
        pytest.param(pool(num_queued=100, slots=50, input_s=10.0), 2, id="as many as the slots need"),
        pytest.param(
            pool(num_running_inputs=6, num_above_target=4, num_ready=1, slots=2, input_s=1.0), 2, id="work above target"
        ),
        pytest.param(pool(num_queued=100, num_ready=2, input_s=1.0, max_containers=3), 1, id="up to the maximum"),
        pytest.param(pool(num_queued=9, num_ready=3, input_s=9.0, max_containers=3), 0, id="which may be reached"),
        pytest.param(
            pool(num_queued=9, num_ending=2, num_finishing=2, input_s=9.0, max_containers=2),
            0,
            id="containers that work on their last input count for the maximum",
        ),
        pytest.param(
            pool(num_queued=1, num_ending=1, max_containers=1), 0, id="as do idle ones on their way out, until they are"
        ),
        pytest.param(pool(num_queued=1, num_ending=1), 1, id="which otherwise keep nobody waiting"),
        pytest.param(
            pool(num_queued=50, num_ending=2, num_finishing=2, input_s=0.001), 0, id="single-use ones occupy the cores"
        ),
        pytest.param(pool(num_queued=1, num_blocked=40), 1, id="containers that wait for others stand in nobody's way"),
        pytest.param(pool(num_queued=1, num_blocked=1, max_containers=1), 0, id="but for the maximum"),
        pytest.param(pool(min_containers=3), 3, id="a minimum is kept without inputs"),
        pytest.param(pool(min_containers=3, num_ready=1, num_starting=1), 1, id="the missing ones of it"),
        pytest.param(pool(min_containers=1, num_blocked=1), 0, id="blocked ones are there"),
        pytest.param(pool(num_running_inputs=1, num_ready=1, buffer_containers=2), 2, id="a buffer while it works"),
        pytest.param(pool(num_ready=1, buffer_containers=2), 0, id="and none while it does not"),
        pytest.param(pool(num_queued=1, may_start=False), 0, id="held back after failures"),
        pytest.param(pool(num_queued=9, min_containers=5, is_on_trial=True), 1, id="after them, one is tried"),
        pytest.param(pool(num_queued=9, num_starting=1, is_on_trial=True), 0, id="no other one meanwhile"),
        pytest.param(pool(min_containers=5, num_ready=1, is_on_trial=True), 4, id="the others follow when it is there"),
    ],
)
def test_how_many_containers_are_started(view, start):
    assert plan(view, NOW, num_cores=2).start == start


@pytest.mark.parametrize(
    ("view", "stop"),
    [
        pytest.param(pool(num_ready=1, idle=(("ta-1", NOW - 61),)), ["ta-1"], id="idle for longer than the window"),
        pytest.param(pool(num_ready=1, idle=(("ta-1", NOW - 59),)), [], id="not yet"),
        pytest.param(
            pool(num_ready=2, idle=(("ta-1", NOW - 90), ("ta-2", NOW - 80)), min_containers=1),
            ["ta-1"],
            id="the minimum stays",
        ),
        pytest.param(
            pool(num_ready=1, idle=(("ta-1", NOW - 90),), num_queued=1), [], id="none while inputs wait for them"
        ),
        pytest.param(
            pool(num_ready=3, idle=(("ta-1", NOW - 1),), busy=("ta-3", "ta-2"), max_containers=1),
            ["ta-1", "ta-3"],
            id="what a lowered maximum leaves no room for",
        ),
        pytest.param(
            pool(num_ready=3, busy=("ta-3", "ta-2", "ta-1"), max_containers=2, num_queued=9),
            ["ta-3"],
            id="also while inputs wait",
        ),
        pytest.param(
            pool(
                num_ready=3,
                num_running_inputs=1,
                idle=(("ta-1", NOW - 90), ("ta-2", NOW - 90)),
                busy=("ta-3",),
                buffer_containers=1,
            ),
            ["ta-1"],
            id="the buffer stays while it works",
        ),
    ],
)
def test_which_containers_are_stopped(view, stop):
    assert list(plan(view, NOW, num_cores=2).stop) == stop


@pytest.mark.parametrize(
    ("num_inputs", "num_ready", "at_a_time"),
    [(0, 0, 2), (4, 2, 2), (5, 2, 10), (5, 3, 2), (1, 0, 10), (1000, 2, 10)],
)
def test_containers_take_more_than_their_target_only_while_there_are_too_few_of_them(num_inputs, num_ready, at_a_time):
    assert concurrency(num_inputs, num_ready, target=2, maximum=10) == at_a_time


small = st.integers(0, 6)


@st.composite
def views(draw) -> PoolView:
    num_idle, num_busy = draw(small), draw(small)
    num_finishing = draw(small)
    return pool(
        num_queued=draw(st.integers(0, 200)),
        num_running_inputs=num_busy,
        slots=draw(st.integers(1, 10)),
        num_starting=draw(small),
        num_ready=num_idle + num_busy,
        num_blocked=draw(small),
        num_ending=num_finishing + draw(small),
        num_finishing=num_finishing,
        idle=tuple((f"idle-{n}", NOW - draw(st.floats(0, 200))) for n in range(num_idle)),
        busy=tuple(f"busy-{n}" for n in range(num_busy)),
        input_s=draw(st.floats(0.0, 100.0)),
        min_containers=draw(small),
        max_containers=draw(small),
        buffer_containers=draw(small),
        may_start=draw(st.booleans()),
    )


@given(views(), st.integers(1, 64))
def test_limits_hold_for_every_pool(view, num_cores):
    start, stop, _ = plan(view, NOW, num_cores)
    there = view.num_starting + view.num_ready + view.num_blocked
    assert start >= 0
    if view.max_containers:
        assert start == 0 or there + view.num_ending + start <= view.max_containers
    assert len(stop) == len(set(stop)) <= view.num_ready
    if not view.max_containers or there <= view.max_containers:
        assert all(task_id.startswith("idle") for task_id in stop)
        assert not stop or there - len(stop) >= view.min_containers
    if not view.may_start:
        assert start == 0


@given(views(), st.integers(1, 64))
def test_an_input_never_waits_for_nothing(view, num_cores):
    """With a queue, and nothing that will take from it, a container is started wherever the limits allow."""
    view = view._replace(num_queued=max(1, view.num_queued), may_start=True)
    if view.num_starting or view.num_ready or view.num_finishing:
        return
    if not view.max_containers or view.num_blocked + view.num_ending < view.max_containers:
        assert plan(view, NOW, num_cores) != PoolPlan(0, ())


def test_a_quota_holds_back_what_would_be_started():
    crowd = pool(num_queued=10, input_s=9.0, quota_room=1)
    assert plan(crowd, NOW, 8) == PoolPlan(start=1, num_held_back=7)
    assert plan(crowd._replace(quota_room=0), NOW, 8) == PoolPlan(num_held_back=8)
    assert plan(crowd._replace(quota_room=99), NOW, 8) == PoolPlan(start=8)


@given(views(), st.integers(1, 64), st.integers(1, 50))
def test_a_longer_queue_never_starts_fewer_nor_stops_more(view, num_cores, more):
    before = plan(view, NOW, num_cores)
    longer = plan(view._replace(num_queued=view.num_queued + more), NOW, num_cores)
    assert longer.start >= before.start
    assert set(longer.stop) <= set(before.stop)


@given(views(), st.integers(1, 64))
def test_without_work_everything_beyond_the_minimum_ends(view, num_cores):
    idle = tuple((task_id, NOW - 1000.0) for task_id, _ in view.idle)
    view = view._replace(
        num_queued=0, num_running_inputs=0, num_starting=0, num_blocked=0, num_ready=len(idle), idle=idle, busy=()
    )
    planned = plan(view, NOW, num_cores)
    assert not planned.start or len(idle) < view.min_containers
    kept = min(view.min_containers, view.max_containers or view.min_containers)
    assert len(idle) - len(planned.stop) == min(len(idle), kept)


def test_an_input_that_runs_for_long_tells_of_the_others_until_one_has_finished():
    assert expected_input_s(None, 0.0) == 0.0
    assert expected_input_s(None, 5.0) == 10.0
    assert expected_input_s(0.1, 5.0) == 5.0
    assert expected_input_s(0.1, 0.0) == 0.1
