"""What containers can see, use up and choose, on the runtimes that isolate them."""

import asyncio
import os

import pytest

from aeolian.worker.runtimes.selection import find_offer

APP = '''
import os
import socket
import time

import modal

app = modal.App("isolated")
SECRET = modal.Secret.from_dict({"OF_ANOTHER": "secret"})


def look(data_dir):
    """What of the host, and of other containers, can be reached from inside."""
    found = []
    for place in (data_dir, "/proc/1/root" + data_dir, "/sys/fs/cgroup/memory/aeolian", "/dev/vda", "/dev/mem"):
        if os.path.exists(place):
            found.append(place)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name, forbidden in (("environ", b"OF_ANOTHER"), ("cmdline", b"aeolian.cli")):
            try:
                if forbidden in open(f"/proc/{pid}/{name}", "rb").read():
                    found.append(f"{name} of {pid}")
            except OSError:
                pass
    for line in open("/proc/net/unix").read().splitlines():
        if data_dir in line and os.environ["MODAL_TASK_ID"] not in line:
            found.append(line)
    for place in ("/proc/sys/kernel/hostname", "/sys/kernel/new", "/proc/sysrq-trigger", "/pkg/modal/new"):
        try:
            with open(place, "w") as file:
                file.write("h")
            found.append(f"wrote {place}")
        except OSError:
            pass
    return found


@app.function(secrets=[SECRET], timeout=60)
def neighbour():
    time.sleep(3)
    return os.environ["OF_ANOTHER"]


@app.function(memory=(64, 128), OPTIONS)
def hungry():
    held = []
    while True:
        held.append(bytearray(b"x") * (1 << 20))


@app.function(ephemeral_disk=20, OPTIONS)
def writes():
    with open("/root/large", "wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    time.sleep(30)


@app.function(OPTIONS)
def kernel():
    return open("/proc/version").read()


@app.function(OPTIONS)
def looks(data_dir):
    return look(data_dir)


def error_of(call):
    try:
        call.get()
    except Exception as error:
        return str(error)
    raise AssertionError("it ended well")


@app.local_entrypoint()
def main(data_dir: str, release: str):
    beside, hunger = neighbour.spawn(), hungry.spawn()
    disk = writes.spawn() if IS_HOSTS_KERNEL else None  # the same for all runtimes
    found = looks.remote(data_dir)
    assert found == [], found
    assert (release in kernel.remote()) == IS_HOSTS_KERNEL
    assert beside.get() == "secret"
    assert "ran out of memory" in error_of(hunger)
    assert disk is None or "may write 20 MiB" in error_of(disk)
    print("all is well")
'''

REFUSED = """
import modal

app = modal.App("refused")


@app.function(experimental_options={"runtime": "docker"})
def f(): ...


@app.local_entrypoint()
def main():
    f.remote()
"""


@pytest.mark.parametrize("runtime", ["", "gvisor"])
def test_a_container_sees_nothing_of_others_and_is_told_what_it_used_up(aeolian, tmp_path, runtime):
    """On the runtime of this Aeolian, and on the one that a Function asks for."""
    if aeolian.runtime == "process":
        pytest.skip("the process runtime does not isolate")
    if runtime:
        offer = asyncio.run(find_offer(runtime, tmp_path))
        if not offer.is_available:
            pytest.skip(str(offer))
    is_hosts_kernel = (runtime or aeolian.runtime) == "native"
    option = f'experimental_options={{"runtime": "{runtime}"}}' if runtime else ""
    source = APP.replace("OPTIONS", option).replace("IS_HOSTS_KERNEL", str(is_hosts_kernel))
    said = aeolian.run_app(source, tmp_path, "--data-dir", str(aeolian.data_dir), "--release", os.uname().release)
    assert "all is well" in said


def test_a_runtime_that_is_not_there_is_refused_with_those_that_are(aeolian, tmp_path):
    said = aeolian.run_app(REFUSED, tmp_path, ok=False)
    assert "asks for the runtime 'docker'" in said and aeolian.runtime in said
