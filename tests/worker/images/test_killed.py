"""A worker that is killed in the middle of a build leaves no process, no mount and no half-made layer."""

import asyncio
import os
import select
import sys
from pathlib import Path

import pytest

from aeolian.worker.images.machine_cache import MachineCache
from aeolian.worker.images.mode import WHOLE

from .conftest import DEBIAN, Workbench

SLEEP = "sleep 7654.25"
BUILD = """
import asyncio, sys
from pathlib import Path
from aeolian.domain.images import ImageSpec
from aeolian.storage.files import ContentStore
from aeolian.worker.images.builder import ImageBuilder
from aeolian.worker.images.mode import WHOLE
from aeolian.worker.images.store import ImageStore
from aeolian.worker.interpreters import Interpreters, StandalonePythons
data, *lines = sys.argv[1:]
data = Path(data)
interpreters = Interpreters(data)
builder = ImageBuilder(ImageStore(data), ContentStore(data / "content"), interpreters,
                       StandalonePythons(data, interpreters), data, mode=WHOLE)
spec = ImageSpec(("FROM base", *lines), base_image_ids={"base": "im-base"})
asyncio.run(builder.build("im-killed", spec, {}, lambda fd, text: print(text, end="", flush=True)))
"""
GONE_TIMEOUT_S = 10


def running(words: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words.encode() in path.read_bytes().replace(b"\0", b" "):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def mounts_below(folder: Path) -> list[str]:
    """In any namespace of this host."""
    found = []
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            found += [line for line in path.read_text().splitlines() if str(folder) in line]
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "step",
    [
        f"RUN echo begun; {SLEEP}",
        f"RUN echo begun; ({SLEEP} & setsid {SLEEP} &) ; {SLEEP}",
        f"RUN useradd joe; echo begun; su joe -c '{SLEEP}'",
    ],
)
async def test_a_killed_builder_leaves_nothing_running(bench, tmp_path, step):
    own = Workbench(tmp_path / "own", mode=WHOLE)
    await own.build(DEBIAN, image_id="im-base")
    builder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", BUILD, str(own.data_dir), step, stdout=asyncio.subprocess.PIPE
    )
    while await builder.stdout.readline() != b"begun\n":
        assert not builder.stdout.at_eof()
    assert mounts_below(own.data_dir)
    processes = [os.pidfd_open(pid) for pid in running(SLEEP)]
    builder.kill()
    await builder.wait()
    for process in processes:  # the kernel needs a moment
        await asyncio.to_thread(select.select, [process], [], [], GONE_TIMEOUT_S)
        os.close(process)
    assert not running(SLEEP)
    assert not mounts_below(own.data_dir)
    assert not own.store.has("im-killed")
    layers = sorted(path.name for path in own.store.layers_folder.iterdir() if path.name.startswith(".new-"))
    assert layers, "what it was at is still there"
    again = Workbench(own.data_dir, mode=WHOLE)
    await again.build("FROM base", "RUN echo fine", base_image_ids={"base": "im-base"})
    assert not list(own.store.layers_folder.glob(".new-*"))


async def test_the_machines_cache_clears_what_a_killed_maker_left_and_only_that(tmp_path):
    (tmp_path / ".new-stale").mkdir()
    cache = MachineCache(tmp_path)

    async def outer(tree):
        async def inner(other):
            (other / "file").touch()

        await MachineCache(tmp_path).tree("inner", inner)
        assert not (tmp_path / ".new-stale").exists()
        (tree / "file").touch()  # its own folder has not been cleared by the other maker

    place = await cache.tree("outer", outer)
    assert sorted(path.name for path in (tmp_path / "layers").iterdir()) == ["inner", "outer"]
    assert (place / "file").exists()
    assert not list(tmp_path.glob(".new-*"))


async def test_two_makers_of_one_base_end_with_one_whole_tree(tmp_path):
    async def second(tree):
        (tree / "file").write_text("second")

    async def first(tree):
        await MachineCache(tmp_path).tree("base", second)
        (tree / "file").write_text("first")

    place = await MachineCache(tmp_path).tree("base", first)
    assert (place / "file").read_text() == "second"


async def test_a_base_that_fails_leaves_nothing(tmp_path):
    async def fail(tree):
        (tree / "half").touch()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        await MachineCache(tmp_path).tree("base", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["layers"]
    assert not list((tmp_path / "layers").iterdir())
