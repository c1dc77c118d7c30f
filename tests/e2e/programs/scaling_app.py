"""Functions that say in which container they ran."""

import asyncio
import os
import signal
import threading
import time

import modal

app = modal.App("scaling")
births = modal.Dict.from_name("scaling-births", create_if_missing=True)
running = 0


def here() -> str:
    return os.environ["MODAL_TASK_ID"]


@app.function(scaledown_window=2)
def quick(x):
    return x, here()


@app.function(scaledown_window=2)
def slow(seconds):
    time.sleep(seconds)
    return here()


@app.function(min_containers=1)
def warm():
    return here()


@app.cls(min_containers=1)
class Kept:
    @modal.enter()
    def note(self):
        births[here()] = time.time()

    @modal.method()
    def dies_later(self):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()


@app.function(buffer_containers=1, scaledown_window=2)
def buffered(seconds):
    time.sleep(seconds)


@app.function(max_containers=1)
@modal.concurrent(max_inputs=20, target_inputs=2)
async def shared(seconds):
    global running
    running += 1
    most = running
    await asyncio.sleep(seconds)
    running -= 1
    return most


@app.cls(scaledown_window=30)
class Model:
    size: int = modal.parameter(default=0)

    @modal.method()
    def where(self):
        return self.size, here()
