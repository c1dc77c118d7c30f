"""Every way of calling a Function, sync and async."""

import asyncio
import itertools
import os
import time

import modal

app = modal.App("calls-basics")


@app.function()
def square(x):
    return x * x


@app.function()
async def async_square(x):
    await asyncio.sleep(0)
    return x * x


@app.function()
def add(x, y=10, *, scale=1):
    return (x + y) * scale


@app.function()
def slow(seconds):
    time.sleep(seconds)
    return seconds


@app.function()
def fails_on(x, bad=()):
    if x in bad:
        raise ValueError(f"no {x}")
    return x


@app.function()
def who():
    return modal.current_input_id(), modal.current_function_call_id(), modal.is_local()


def check_remote_and_local():
    assert square.remote(7) == square.local(7) == 49
    assert async_square.remote(3) == 9
    assert asyncio.run(async_square.local(3)) == 9
    assert add.remote(1) == 11
    assert add.remote(1, 2, scale=3) == 9
    input_id, call_id, is_local = who.remote()
    assert input_id.startswith("in-") and call_id.startswith("fc-") and not is_local
    assert modal.is_local() and modal.current_input_id() is None


def check_maps():
    squares = [x * x for x in range(100)]
    assert list(square.map(range(100))) == squares
    assert sorted(square.map(range(100), order_outputs=False)) == squares
    assert list(add.map([1, 2, 3], [4, 5, 6], kwargs={"scale": 2})) == [10, 14, 18]
    assert list(add.map([1, 2, 3], [4, 5])) == [5, 7]
    assert list(add.starmap([(1, 2), (3, 4)], kwargs={"scale": 2})) == [6, 14]
    assert list(square.map([])) == []
    assert square.for_each(range(20)) is None


def check_an_unordered_map_yields_what_is_ready():
    assert list(slow.map([1.5, 0.01, 0.02], order_outputs=False))[-1] == 1.5


def check_a_map_is_fed_and_read_lazily():
    fed = []

    def inputs():
        for x in range(5):
            fed.append(x)
            yield x
            time.sleep(0.3)

    outputs = iter(square.map(inputs()))
    assert next(outputs) == 0
    assert len(fed) < 5
    assert list(outputs) == [1, 4, 9, 16]
    for number, output in enumerate(square.map(itertools.count())):
        assert output == number * number
        if number == 300:
            break
    assert square.remote(5) == 25


def check_exceptions_in_maps():
    results = list(fails_on.map(range(5), kwargs={"bad": (2, 3)}, return_exceptions=True))
    assert [type(result) for result in results] == [int, int, ValueError, ValueError, int]
    results = fails_on.map(range(3), kwargs={"bad": (1,)}, return_exceptions=True, wrap_returned_exceptions=False)
    assert [str(result) for result in results] == ["0", "no 1", "2"]
    for run in (lambda **kw: list(fails_on.map(range(5), **kw)), lambda **kw: fails_on.for_each(range(5), **kw)):
        try:
            run(kwargs={"bad": (2,)})
        except ValueError as error:
            assert str(error) == "no 2"
        else:
            raise AssertionError("it did not raise")
    fails_on.for_each(range(5), kwargs={"bad": (2,)}, ignore_exceptions=True)


def check_spawned_calls():
    call = square.spawn(9)
    assert call.get() == call.get() == 81
    assert call.num_inputs() == 1
    assert modal.FunctionCall.from_id(call.object_id).get(timeout=0) == 81
    assert modal.FunctionCall.gather(*[square.spawn(x) for x in range(5)]) == [0, 1, 4, 9, 16]
    square.spawn_map(range(10))
    call = square.experimental_spawn_map(range(120))
    assert list(call.iter()) == [x * x for x in range(120)]
    assert list(call.iter(start=3, end=6)) == [9, 16, 25]
    assert call.get(index=7) == 49 and call.num_inputs() == 120
    call = slow.spawn(2)
    for timeout in (0, 0.3):
        try:
            call.get(timeout=timeout)
        except TimeoutError:
            continue
        raise AssertionError("it did not time out")
    assert call.get(timeout=30) == 2


async def check_the_async_interface():
    assert await square.remote.aio(4) == 16
    assert [x async for x in square.map.aio(range(20))] == [x * x for x in range(20)]

    async def inputs():
        for x in range(5):
            yield x
            await asyncio.sleep(0.05)

    assert [x async for x in square.map.aio(inputs())] == [0, 1, 4, 9, 16]
    assert [x async for x in add.starmap.aio([(1, 2)])] == [3]
    await square.for_each.aio(range(5))
    call = await square.spawn.aio(3)
    assert await call.get.aio() == 9
    assert await asyncio.gather(*(square.remote.aio(x) for x in range(30))) == [x * x for x in range(30)]
    await square.spawn_map.aio(range(3))
    calls = [await square.spawn.aio(x) for x in range(3)]
    assert await modal.FunctionCall.gather.aio(*calls) == [0, 1, 4]


def run():
    with app.run():
        check_remote_and_local()
        check_maps()
        check_an_unordered_map_yields_what_is_ready()
        check_a_map_is_fed_and_read_lazily()
        if os.environ.get("MODAL_PAYLOAD_FORMAT") != "cbor":  # which carries no exceptions
            check_exceptions_in_maps()
        check_spawned_calls()
        asyncio.run(check_the_async_interface())
    print("all is well")
