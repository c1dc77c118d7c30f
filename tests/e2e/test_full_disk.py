"""A data directory whose disk is full: every write says so and changes nothing, and all goes on once there is room."""

import os
import subprocess
import uuid
from pathlib import Path

import pytest
from running import RunningAeolian

SIZE = "300m"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own for the data directory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted: not root, or not allowed to")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def on_small_disk(small_disk):
    running = RunningAeolian(small_disk / "data", "process").start()
    yield running
    running.stop()


class Filler:
    """Takes all the room there is."""

    def __init__(self, place: Path):
        self._path = place / "filler"

    def fill(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1 << 20, 4096):
                try:
                    while True:
                        os.write(descriptor, bytes(size))
                except OSError:
                    pass
        finally:
            os.close(descriptor)

    def free(self) -> None:
        self._path.unlink()


PROGRAM = """
    import io, os, sys, time
    import modal
    from modal.exception import ConflictError

    def put(volume, name, size):
        with volume.batch_upload(force=True) as batch:
            batch.put_file(io.BytesIO(os.urandom(size)), name)

    d = modal.Dict.from_name("d", create_if_missing=True)
    q = modal.Queue.from_name("q", create_if_missing=True)
    new = modal.Volume.from_name("new", create_if_missing=True)
    old = modal.Volume.from_name("old", create_if_missing=True, version=1)
    # Larger than what the database may have in reserve.
    LARGE = 20 << 20
    writes = {
        "Dict": lambda: d.put("large", os.urandom(LARGE)),
        "Queue": lambda: q.put_many([os.urandom(1 << 20) for _ in range(20)], block=False),
        "Volume v2": lambda: put(new, "large", LARGE),
        "Volume v1": lambda: put(old, "large", LARGE),
        "small file": lambda: put(new, "small", 10_000),
        "small file v1": lambda: put(old, "small", 10_000),
    }

    def state():
        listed = [[(entry.path, entry.mtime) for entry in volume.listdir("/")] for volume in (new, old)]
        return len(d.get("large", b"")), d["small"], q.len(), listed, [s.name for s in modal.Secret.objects.list()]
"""


def test_writes_to_a_full_disk_are_refused_and_all_goes_on_when_there_is_room(on_small_disk, small_disk, tmp_path):
    filler = Filler(small_disk)

    def client(code: str) -> None:
        name = f"client-{uuid.uuid4().hex[:8]}.py"
        assert "all is well" in on_small_disk.python(PROGRAM + code, tmp_path, name=name)

    client(
        """
    d["small"] = "before"
    assert q.len() == 0
    put(new, "kept", 1000)
    put(old, "kept", 1000)
    modal.Secret.objects.create("s", {"A": "1"})
    print("all is well")
    """
    )
    filler.fill()
    refused = """
    before = state()
    assert before[1] == "before"
    for what, write in writes.items():
        started = time.monotonic()
        try:
            write()
        except ConflictError as error:
            assert "the server's disk is full" in str(error), (what, error)
        else:
            raise AssertionError(f"{what}: a full disk took it")
        print(what, f"was refused within {time.monotonic() - started:.2f} s")
    assert state() == before, (state(), before)
    for volume in (new, old):
        assert sum(map(len, volume.read_file("kept"))) == 1000
    print("all is well")
    """
    client(refused)
    on_small_disk.kill("server")
    client(refused)

    filler.free()
    client(
        """
    for what, write in writes.items():
        write()
    assert len(d["large"]) == LARGE and q.len() == 20 and d["small"] == "before"
    for volume in (new, old):
        assert sum(map(len, volume.read_file("large"))) == LARGE
    print("all is well")
    """
    )
