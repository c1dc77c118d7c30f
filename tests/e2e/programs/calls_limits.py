"""Timeouts, retries and cancellation."""

import asyncio
import ctypes
import os
import time

import modal
from modal.exception import FunctionTimeoutError, RemoteError

app = modal.App("calls-limits")
state = modal.Dict.from_name("calls-limits", create_if_missing=True)
TASK_ID = "MODAL_TASK_ID"


def attempt_of(key: str) -> int:
    state[key] = count = state.get(key, 0) + 1
    state[f"{key}-{count}"] = time.time()
    return count


@app.function(timeout=2, max_containers=1)
def sleeps(seconds):
    time.sleep(seconds)
    return os.environ[TASK_ID]


@app.function(timeout=2, max_containers=1)
async def sleeps_async(seconds):
    await asyncio.sleep(seconds)
    return os.environ[TASK_ID]


@app.function(timeout=2)
def hangs(seconds):
    if seconds:
        ctypes.PyDLL(None).sleep(seconds)  # which neither lets go of the interpreter nor hears signals
    return os.environ[TASK_ID]


@app.function(timeout=2)
def goes_on(seconds):
    until = time.time() + seconds
    while time.time() < until:
        try:
            time.sleep(0.5)
        except BaseException:
            continue
    return os.environ[TASK_ID]


@app.function(retries=2)
def fails_twice(key, times=2):
    attempt = attempt_of(f"{key} fails")
    if attempt <= times:
        raise ValueError(f"attempt {attempt}")
    return attempt


@app.function(retries=modal.Retries(max_retries=2, backoff_coefficient=2.0, initial_delay=1.0))
def backs_off(key):
    attempt = attempt_of(f"{key} backs off")
    if attempt <= 2:
        raise ValueError(f"attempt {attempt}")
    return attempt


@app.function(retries=1, timeout=5)
def is_late_once(key):
    attempt = attempt_of(f"{key} is late")
    if attempt == 1:
        time.sleep(20)
    return attempt


@app.function(retries=0)
def loses_its_container_once(key):
    attempt = attempt_of(f"{key} is lost")
    if attempt == 1:
        os.kill(os.getpid(), 9)
    return attempt


@app.function(max_containers=1)
def long(seconds):
    time.sleep(seconds)
    return os.environ[TASK_ID]


@app.function(max_containers=1)
async def long_async(seconds):
    await asyncio.sleep(seconds)
    return os.environ[TASK_ID]


@app.function(max_containers=1)
def one_by_one(seconds):
    time.sleep(seconds)
    return os.environ[TASK_ID]


@app.cls(startup_timeout=3)
class StartsSlowly:
    @modal.enter()
    def wait(self):
        time.sleep(60)

    @modal.method()
    def answer(self):
        return 42


@app.cls(startup_timeout=60, timeout=3)
class StartsInTime:
    @modal.enter()
    def wait(self):
        time.sleep(4)

    @modal.method()
    def answer(self):
        return 42


def raised_by(call, *args) -> BaseException:
    try:
        result = call(*args)
    except Exception as error:
        return error
    raise AssertionError(f"it returned {result!r}")


def check_that_a_timeout_leaves_the_container_usable():
    for function in (sleeps, sleeps_async):
        before = function.remote(0)
        error = raised_by(function.remote, 30)
        assert isinstance(error, FunctionTimeoutError) and "timeout of 2 s" in str(error)
        assert function.remote(0) == before
    ends = list(sleeps.map([0, 30, 0], return_exceptions=True))
    assert [type(end) for end in ends] == [str, FunctionTimeoutError, str]


def check_that_a_function_that_hangs_is_replaced():
    for function in (hangs, goes_on):
        before = function.remote(0)
        assert isinstance(raised_by(function.remote, 60), FunctionTimeoutError)
        assert function.remote(0) != before


def check_startup_timeouts():
    error = raised_by(StartsSlowly().answer.remote)
    assert isinstance(error, FunctionTimeoutError) and "startup_timeout" in str(error), error
    assert StartsInTime().answer.remote() == 42


def check_retries():
    assert fails_twice.remote("remote") == 3
    assert fails_twice.spawn("spawn").get() == 3
    assert list(fails_twice.starmap([("a", 1), ("b", 2), ("c", 0)])) == [2, 3, 1]


def check_that_retries_come_to_an_end():
    assert str(raised_by(fails_twice.remote, "remote in vain", 3)) == "attempt 3"
    assert str(raised_by(lambda: fails_twice.spawn("spawn in vain", 3).get())) == "attempt 3"
    [error] = fails_twice.starmap([("map in vain", 3)], return_exceptions=True)
    assert str(error) == "attempt 3"


def check_the_delays_of_retries():
    for key, call in (("by client", backs_off.remote), ("by server", lambda key: backs_off.spawn(key).get())):
        assert call(key) == 3
        times = [state[f"{key} backs off-{count}"] for count in (1, 2, 3)]
        assert times[1] - times[0] > 0.9 and times[2] - times[1] > 1.9, times


def check_retries_after_timeouts():
    assert is_late_once.remote("late") == 2
    assert is_late_once.spawn("late too").get() == 2


def check_that_a_lost_container_uses_up_no_retry():
    assert loses_its_container_once.remote("remote") == 2
    assert loses_its_container_once.spawn("spawn").get() == 2
    assert list(loses_its_container_once.map(["first", "second"])) == [2, 2]


def check_cancellation(function):
    before = function.remote(0)
    for terminate in (False, True):
        call = function.spawn(100)
        while not function.get_current_stats().num_running_inputs:
            time.sleep(0.05)
        time.sleep(0.3)
        call.cancel(terminate_containers=terminate)
        error = raised_by(call.get)
        assert isinstance(error, RemoteError) and "was cancelled" in str(error), error
        assert (function.remote(0) == before) is not terminate


def check_cancellation_of_a_sync_function():
    check_cancellation(long)


def check_cancellation_of_an_async_function():
    check_cancellation(long_async)


def check_cancellation_of_queued_inputs():
    calls = [one_by_one.spawn(2), *(one_by_one.spawn(0) for _ in range(3))]
    calls[2].cancel()
    assert isinstance(raised_by(calls[2].get), RemoteError)
    assert len({calls[number].get() for number in (0, 1, 3)}) == 1
    calls[0].cancel()  # too late: it has its result
    assert calls[0].get() == calls[1].get()


def run():
    from together import together

    with app.run():
        state.clear()
        together(
            check_that_a_timeout_leaves_the_container_usable,
            check_that_a_function_that_hangs_is_replaced,
            check_startup_timeouts,
            check_cancellation_of_a_sync_function,
            check_cancellation_of_an_async_function,
            check_cancellation_of_queued_inputs,
        )
        together(
            check_retries,
            check_that_retries_come_to_an_end,
            check_the_delays_of_retries,
            check_retries_after_timeouts,
            check_that_a_lost_container_uses_up_no_retry,
        )
    print("all is well")
