from pathlib import Path

import pytest

from aeolian.worker.disk_watch import Disk, DiskWatch, Writer, size_of, too_large

MIB = 1 << 20
ROOMY = Disk(free_bytes=1000 * MIB, reserve_bytes=100 * MIB)
NEARLY_FULL = Disk(free_bytes=50 * MIB, reserve_bytes=100 * MIB)


def writer(task_id, max_mib=10_000, end=None, folder=Path("/none")):
    return Writer(task_id, folder, max_mib * MIB, end or (lambda why: None))


@pytest.mark.parametrize(
    ("sizes_mib", "disk", "ended"),
    [
        ({"a": 10, "b": 20}, ROOMY, []),
        ({"a": 10, "b": 21}, ROOMY, ["b"]),
        ({"a": 10, "b": 21}, NEARLY_FULL, ["b"]),
        ({"a": 200, "b": 20}, NEARLY_FULL, ["a"]),
        ({"a": 20, "b": 10}, NEARLY_FULL, []),
        ({"a": 10_001, "b": 21}, ROOMY, ["a", "b"]),
    ],
)
def test_who_is_above_its_limit_or_fills_the_disk_is_ended_and_nobody_else(sizes_mib, disk, ended):
    writers = [writer("a"), writer("b", max_mib=20)]
    found = too_large(writers, {name: size * MIB for name, size in sizes_mib.items()}, disk)
    assert [it.task_id for it, _ in found] == ended


def test_the_reason_says_how_much_was_written():
    ((_, why),) = too_large([writer("a", max_mib=20)], {"a": 3000 * MIB}, ROOMY)
    assert why == "wrote 2.9 GiB to its own files, and may write 20 MiB"
    ((_, why),) = too_large([writer("a")], {"a": 300 * MIB}, NEARLY_FULL)
    assert why == "wrote 300 MiB to its own files, and this machine's disk is full"


async def test_a_container_that_wrote_too_much_is_ended_with_the_reason(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/file").write_bytes(bytes(3 * MIB))
    said = []
    watch = DiskWatch(tmp_path, lambda: [writer("a", max_mib=2, end=said.append, folder=tmp_path)])
    await watch.look(ROOMY)
    assert said == ["wrote 3 MiB to its own files, and may write 2 MiB"]


def test_a_folder_that_is_gone_and_links_hold_nothing(tmp_path):
    (tmp_path / "link").symlink_to("/usr")
    assert size_of(tmp_path / "gone") == 0
    assert size_of(tmp_path) < MIB
