"""Large arguments and results, and generators."""

import asyncio
import hashlib
import os
import time

import modal

app = modal.App("calls-payloads")
MIB = 1 << 20


@app.function()
def echo(x):
    return x


@app.function()
def digest(data):
    return len(data), hashlib.sha256(data).hexdigest()


@app.function()
def makes(num_bytes):
    return bytes(num_bytes)


@app.function()
def counts(n):
    yield from range(n)


@app.function()
def yields_blocks(n, num_bytes):
    for number in range(n):
        yield number, bytes(num_bytes)


@app.function()
async def counts_async(n):
    for number in range(n):
        yield number
        if number % 50 == 0:
            await asyncio.sleep(0.01)


@app.function()
def stumbles(n):
    yield from range(n)
    raise ValueError("in the middle")


@app.function(max_containers=1)
def never_ends(pause=0.0):
    number = 0
    while True:
        yield number
        number += 1
        time.sleep(pause)


@app.function()
def ticks(n):
    for _ in range(n):
        yield time.time()
        time.sleep(0.5)


@app.cls()
class Counter:
    @modal.method()
    def doubles(self, n):
        for number in range(n):
            yield 2 * number


def check_sizes_around_the_limits():
    for num_bytes in (0, 1, 2 * MIB - 1000, 2 * MIB, 2 * MIB + 1, 5 * MIB):
        data = os.urandom(num_bytes)
        assert echo.remote(data) == data
    data = os.urandom(9000)  # of spawned calls, what is above 8 KiB is a blob
    assert echo.spawn(data).get() == data
    blocks = [os.urandom(3 * MIB) for _ in range(6)]
    assert list(echo.map(blocks)) == blocks


def check_generators():
    assert list(counts.remote_gen(2000)) == list(range(2000))
    assert list(counts.remote_gen(0)) == []
    assert list(counts_async.remote_gen(300)) == list(range(300))
    assert list(Counter().doubles.remote_gen(5)) == [0, 2, 4, 6, 8]
    assert [number for number, _ in yields_blocks.remote_gen(5, 3 * MIB)] == list(range(5))
    assert [number for number, _ in yields_blocks.remote_gen(40, MIB)] == list(range(40))
    found = []
    try:
        for number in stumbles.remote_gen(10):
            found.append(number)
    except ValueError as error:
        assert str(error) == "in the middle" and found == list(range(10))
    else:
        raise AssertionError("it did not raise")


def check_that_items_come_as_they_are_yielded():
    for yielded_at in ticks.remote_gen(4):
        assert time.time() - yielded_at < 0.4


def check_generators_that_are_left():
    for number in never_ends.remote_gen(0.1):
        if number == 3:
            break
    for number in counts.remote_gen(100_000):
        if number == 3000:
            break
    assert list(counts.remote_gen(3)) == [0, 1, 2]


async def check_async_generators():
    assert [number async for number in counts_async.remote_gen.aio(50)] == list(range(50))
    assert [number async for number in counts.remote_gen.aio(50)] == list(range(50))


def run():
    with app.run():
        check_sizes_around_the_limits()
        check_generators()
        check_that_items_come_as_they_are_yielded()
        check_generators_that_are_left()
        asyncio.run(check_async_generators())
    print("all is well")


def send_and_return(num_mib):
    """One large payload each way."""
    block = os.urandom(MIB)
    with app.run():
        data = block * num_mib
        num_bytes = len(data)
        expected = hashlib.sha256(data).hexdigest()
        assert digest.remote(data) == (num_bytes, expected)
        del data
        assert len(makes.remote(num_bytes)) == num_bytes
    print("all is well")
