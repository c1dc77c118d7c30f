"""Half an hour of everything at once: nothing of the server's grows with time.

`AEOLIAN_SOAK_S` makes it shorter.
"""

import os
import sys
import textwrap
import time

import psutil
import pytest
from faults import client

SOAK_S = float(os.environ.get("AEOLIAN_SOAK_S", "1800"))
NUM_SAMPLES = 30
MAX_GROWTH_MIB = 25
MAX_NEW_FILES = 20
MAX_BYTES_A_CALL = 3000
"""In the database: finished calls can be asked for, for an hour."""

APP = """
    import io
    import random
    import time

    import modal

    app = modal.App("soak")
    volume = modal.Volume.from_name("soak-volume", create_if_missing=True, version=2)
    kept = modal.Dict.from_name("soak-dict", create_if_missing=True)
    waiting = modal.Queue.from_name("soak-queue", create_if_missing=True)

    @app.function(volumes={"/data": volume}, scaledown_window=5)
    def write(number):
        with open(f"/data/{number % 5}", "wb") as file:
            file.write(bytes([number % 256]) * 100_000)
        volume.commit()
        print("wrote", number)

    @app.function(scaledown_window=2, max_containers=2)
    def double(x):
        if x == 13:
            raise ValueError(x)
        return 2 * x

    @app.function(scaledown_window=2)
    def count(n):
        yield from range(n)

    @app.local_entrypoint()
    def main(seconds: float):
        until, number, num_calls = time.time() + seconds, 0, 0
        while time.time() < until:
            number += 1
            found = list(double.map(range(100), return_exceptions=True))
            assert sum(isinstance(x, Exception) for x in found) == 1
            assert double.remote(bytes(3 << 20)) == bytes(6 << 20)
            assert list(count.remote_gen(20)) == list(range(20))
            assert double.spawn(4).get() == 8
            kept[number % 50] = random.randbytes(1000)
            waiting.put_many(list(range(20)))
            assert waiting.get_many(20) == list(range(20))
            if number % 5 == 0:
                write.remote(number)
            num_calls += 4
            print(f"round {number}: {num_calls + 100 * number} inputs", flush=True)
        print("all is well")
"""


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 300)
def test_nothing_grows_with_time(aeolian, tmp_path):
    (tmp_path / "soak.py").write_text(textwrap.dedent(APP))
    memory, files = [], []
    command = (sys.executable, "-m", "modal", "run", "soak.py", "--seconds", str(SOAK_S))
    with client(aeolian, *command, cwd=tmp_path) as running:
        running.wait_for("^round 3:")
        size_before = database_bytes(aeolian)
        for _ in range(NUM_SAMPLES):
            time.sleep(SOAK_S / NUM_SAMPLES * 0.9)
            memory.append(aeolian.memory_mib())
            files.append(sum(psutil.Process(aeolian.pid_of(name)).num_fds() for name in ("front", "server", "worker")))
        output = running.end(300)
    assert "all is well" in output
    num_inputs = int(output.rpartition(" inputs")[0].rpartition(" ")[2])
    third = NUM_SAMPLES // 3
    print(f"{num_inputs:,} inputs; memory {memory} MiB; open files {files}")
    assert min(memory[-third:]) - max(memory[:third]) < MAX_GROWTH_MIB, memory
    assert min(files[-third:]) - max(files[:third]) < MAX_NEW_FILES, files
    assert (database_bytes(aeolian) - size_before) / num_inputs < MAX_BYTES_A_CALL


def database_bytes(aeolian) -> int:
    return sum(path.stat().st_size for path in aeolian.data_dir.glob("aeolian.db*"))
