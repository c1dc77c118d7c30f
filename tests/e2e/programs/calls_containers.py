"""How inputs share containers, and how many containers there are."""

import asyncio
import os
import threading
import time

import modal

app = modal.App("calls-containers")
TASK_ID = "MODAL_TASK_ID"


def me() -> str:
    return os.environ[TASK_ID]


@app.function(max_containers=1)
@modal.concurrent(max_inputs=10)
def shares(seconds):
    time.sleep(seconds)
    return me(), threading.get_ident()


@app.function(max_containers=1)
@modal.concurrent(max_inputs=10)
async def shares_async(seconds):
    await asyncio.sleep(seconds)
    return me(), modal.current_input_id()


@app.function()
@modal.concurrent(max_inputs=8, target_inputs=2)
async def aims_at_two(seconds):
    await asyncio.sleep(seconds)
    return me()


@app.function()
@modal.batched(max_batch_size=4, wait_ms=500)
def adds(xs, ys):
    return [(x + y, len(xs)) for x, y in zip(xs, ys, strict=True)]


@app.function()
@modal.batched(max_batch_size=4, wait_ms=200)
async def is_unlucky(xs):
    if 13 in xs:
        raise ValueError("unlucky")
    return [2 * x for x in xs]


@app.function(max_containers=1)
@modal.batched(max_batch_size=2, wait_ms=2000)
def slow_batch(xs):
    time.sleep(max(xs))
    return xs


@app.cls()
class Model:
    @modal.enter()
    def load(self):
        self.factor = 10

    @modal.batched(max_batch_size=3, wait_ms=200)
    async def predict(self, xs):
        return [x * self.factor for x in xs]


@app.function(single_use_containers=True, max_containers=2)
def once(seconds):
    began = time.time()
    time.sleep(seconds)
    return me(), began, time.time()


@app.function(max_containers=2)
def at_most_two(seconds):
    time.sleep(seconds)
    return me()


@app.function(scaledown_window=2)
def ends_soon():
    return me()


@app.function(min_containers=1, scaledown_window=2)
def kept_warm():
    return me()


@app.function(buffer_containers=1)
def buffered(seconds):
    time.sleep(seconds)


@app.function()
def rescaled(seconds=0):
    time.sleep(seconds)
    return me()


def until(condition, seconds=20) -> None:
    ends_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends_at, "it did not come to that"
        time.sleep(0.1)


def num_containers(function) -> int:
    return function.get_current_stats().num_total_runners


def most_at_a_time(spans) -> int:
    steps = sorted([(began, 1) for began, _ in spans] + [(ended, -1) for _, ended in spans])
    return max(sum(step for _, step in steps[: number + 1]) for number in range(len(steps)))


def check_inputs_in_one_container_at_a_time():
    for function in (shares, shares_async):
        function.remote(0)
        began = time.time()
        results = list(function.map([2] * 10))
        assert time.time() - began < 15, "they ran one after another"
        assert len({task_id for task_id, _ in results}) == 1
        assert len({other for _, other in results}) > 1


def check_that_cancellation_spares_the_neighbours():
    calls = [shares_async.spawn(4) for _ in range(3)]
    until(lambda: shares_async.get_current_stats().num_running_inputs == 3)
    calls[0].cancel()
    assert len({calls[number].get()[0] for number in (1, 2)}) == 1
    # Where a thread cannot be stopped the container ends, and the others run again elsewhere.
    calls = [shares.spawn(3) for _ in range(3)]
    until(lambda: shares.get_current_stats().num_running_inputs == 3)
    calls[0].cancel()
    assert [len(calls[number].get()) for number in (1, 2)] == [2, 2]
    calls = [slow_batch.spawn(seconds) for seconds in (3, 0)]
    until(lambda: slow_batch.get_current_stats().num_running_inputs == 2)
    time.sleep(0.5)
    calls[0].cancel()
    assert calls[1].get() == 0


def check_a_target_below_the_maximum():
    calls = [aims_at_two.spawn(60) for _ in range(6)]
    until(lambda: num_containers(aims_at_two) >= 2)
    for call in calls:
        call.cancel()


def check_batches():
    results = list(adds.map(range(10), range(10)))
    assert [total for total, _ in results] == [2 * x for x in range(10)]
    assert max(size for _, size in results) == 4
    assert adds.remote(1, 2) == (3, 1)
    results = list(is_unlucky.map([1, 13, 2, 3, 4, 5, 6, 7], return_exceptions=True))
    assert sum(isinstance(result, ValueError) for result in results) == 4
    assert results[4:] == [8, 10, 12, 14]
    assert list(Model().predict.map(range(7))) == [10 * x for x in range(7)]


def check_single_use():
    results = list(once.map([0.3] * 6))
    assert len({task_id for task_id, _, _ in results}) == 6
    assert most_at_a_time([span for _, *span in results]) <= 2


def check_a_maximum():
    assert len(set(at_most_two.map([0.2] * 12))) == 2


def check_idle_containers_end():
    first = ends_soon.remote()
    until(lambda: num_containers(ends_soon) == 0)
    assert ends_soon.remote() != first


def check_a_minimum_stays():
    until(lambda: num_containers(kept_warm) == 1)
    first = kept_warm.remote()
    time.sleep(4)
    assert kept_warm.remote() == first


def check_a_buffer_comes_with_work():
    call = buffered.spawn(30)
    until(lambda: num_containers(buffered) == 2)
    call.cancel()


def check_overriding():
    assert rescaled.autoscaler.update(min_containers=2).min_containers == 2
    until(lambda: num_containers(rescaled) == 2)
    rescaled.update_autoscaler(min_containers=0, scaledown_window=2)
    until(lambda: num_containers(rescaled) == 0)
    settings = rescaled.autoscaler.update(max_containers=1)
    assert (settings.max_containers, settings.scaledown_window) == (1, 2)
    calls = [rescaled.spawn(1) for _ in range(4)]
    until(lambda: rescaled.get_current_stats().num_running_inputs == 1)
    stats = rescaled.get_current_stats()
    assert stats.backlog and stats.num_total_runners == 1 and stats.input_headroom == 0
    assert len({call.get() for call in calls}) == 1


def run():
    from together import together

    with app.run():
        together(
            check_inputs_in_one_container_at_a_time,
            check_batches,
            check_single_use,
            check_a_maximum,
            check_idle_containers_end,
            check_a_minimum_stays,
        )
        together(
            check_that_cancellation_spares_the_neighbours,
            check_a_target_below_the_maximum,
            check_a_buffer_comes_with_work,
            check_overriding,
        )
    print("all is well")
