"""Calls from inside containers. Each asks for as many cores as small machines have."""

import asyncio
import time
import traceback

import modal

app = modal.App("calls-nested")


@app.function(cpu=2)
def bottom(x):
    return x + 1


@app.function(cpu=2)
def middle(x):
    return sum(bottom.map(range(x)))


@app.function(cpu=2)
def top(x):
    assert modal.current_input_id() and not modal.is_local()
    return middle.remote(x) + sum(middle.map([1, 2])) + middle.spawn(1).get()


@app.function(cpu=1)
def factorial(n):
    return 1 if n <= 1 else n * factorial.remote(n - 1)


@app.function(cpu=1)
def fibonacci(n):
    return n if n < 2 else sum(fibonacci.map([n - 1, n - 2]))


@app.function(cpu=1)
async def fibonacci_async(n):
    if n < 2:
        return n
    return sum(await asyncio.gather(fibonacci_async.remote.aio(n - 1), fibonacci_async.remote.aio(n - 2)))


@app.function()
def yields(n):
    for x in range(n):
        yield bottom.remote(x)


@app.function()
def reads(n):
    return list(yields.remote_gen(n))


@app.function()
def spawns(n):
    return [bottom.spawn(x).object_id for x in range(n)]


@app.function()
def fails(x):
    raise KeyError(x)


@app.function()
def passes_on(x):
    return fails.remote(x)


@app.function()
def sleeps(seconds):
    time.sleep(seconds)
    return seconds


@app.function(timeout=3)
def waits(seconds):
    return sleeps.remote(seconds)


@app.function()
def waits_longer(seconds):
    return waits.remote(seconds)


def check_three_levels():
    assert top.remote(5) == 15 + (1 + 3) + 1
    assert list(top.map([1, 2, 3])) == [6, 8, 11]


def check_recursion():
    assert factorial.remote(10) == 3628800
    assert fibonacci.remote(6) == 8
    assert fibonacci_async.remote(5) == 5


def check_generators_and_spawned_calls():
    assert reads.remote(4) == [1, 2, 3, 4]
    assert [modal.FunctionCall.from_id(call_id).get() for call_id in spawns.remote(3)] == [1, 2, 3]


def check_that_exceptions_pass_through():
    try:
        passes_on.remote(3)
    except KeyError as error:
        trace = "".join(traceback.format_exception(error))
        assert "in fails" in trace and "in passes_on" in trace, trace
    else:
        raise AssertionError("it did not raise")


def until_nothing_sleeps():
    ends_at = time.monotonic() + 20
    while sleeps.get_current_stats().num_running_inputs:
        assert time.monotonic() < ends_at, "it still sleeps although nobody waits for it"
        time.sleep(0.1)


def check_that_what_nobody_waits_for_any_more_is_cancelled():
    try:
        waits_longer.remote(100)
    except modal.exception.FunctionTimeoutError:
        until_nothing_sleeps()
    else:
        raise AssertionError("it did not time out")
    call = waits_longer.spawn(100)
    while not sleeps.get_current_stats().num_running_inputs:
        time.sleep(0.1)
    call.cancel()
    until_nothing_sleeps()


def check_the_call_graph():
    call = top.spawn(2)
    call.get()
    [root] = call.get_call_graph()
    assert (root.function_name, root.status, root.module_name) == ("top", modal.types.InputStatus.SUCCESS, __name__)
    assert root.function_call_id == call.object_id and root.task_id.startswith("ta-")
    assert [node.function_name for node in root.children] == ["middle"] * 4
    assert sorted(len(node.children) for node in root.children) == [1, 1, 2, 2]
    assert {leaf.function_name for node in root.children for leaf in node.children} == {"bottom"}


def run():
    with app.run():
        check_three_levels()
        check_recursion()
        check_generators_and_spawned_calls()
        check_that_exceptions_pass_through()
        check_that_what_nobody_waits_for_any_more_is_cancelled()
        check_the_call_graph()
    print("all is well")
