"""The App that `calls.py` measures. Each entrypoint prints one line of JSON, the last of its output."""

import json
import statistics
import time

import modal

app = modal.App("benchmark-calls")


@app.function(max_containers=1)
def one(x):
    return x


@app.function(max_containers=2)
def two(x):
    return x


@app.function(max_containers=4)
def four(x):
    return x


@app.function(single_use_containers=True)
def first_line():
    return time.time()


@app.local_entrypoint()
def warm(count: int = 300):
    one.remote(0)
    took_ms = []
    for number in range(count):
        at = time.perf_counter()
        one.remote(number)
        took_ms.append(1000 * (time.perf_counter() - at))
    took_ms.sort()
    print(json.dumps({"p50_ms": statistics.median(took_ms), "p99_ms": took_ms[int(0.99 * count)]}))


@app.local_entrypoint()
def mapped(containers: int = 1, count: int = 2000):
    function = {1: one, 2: two, 4: four}[containers]
    assert len(list(function.map(range(8 * containers)))) == 8 * containers
    at = time.perf_counter()
    assert sum(function.map(range(count), order_outputs=False)) == sum(range(count))
    took_s = time.perf_counter() - at
    print(json.dumps({"inputs_per_s": count / took_s, "seconds": took_s}))


@app.local_entrypoint()
def cold(count: int = 11):
    """Each call gets a container of its own; the first one also prepares what the others start from."""
    first_line.remote()
    to_first_line_s, whole_s = [], []
    for _ in range(count):
        time.sleep(0.5)
        at, began = time.time(), time.perf_counter()
        to_first_line_s.append(first_line.remote() - at)
        whole_s.append(time.perf_counter() - began)
    print(json.dumps({"first_line_s": statistics.median(to_first_line_s), "whole_call_s": statistics.median(whole_s)}))
