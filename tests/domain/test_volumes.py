import pytest
from hypothesis import given
from hypothesis import strategies as st

from aeolian.domain.errors import InvalidArgument
from aeolian.domain.volumes import (
    BLOCK_BYTES,
    EntryKind,
    VolumeEntry,
    block_slices,
    clean_path,
    merge_pages,
    num_blocks,
    resolve_link,
)


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [("/", ""), ("", ""), (".", ""), ("/a/b", "a/b"), ("a/b/", "a/b"), ("./a/./b", "a/b"), ("a b%", "a b%")],
)
def test_paths_of_clients_are_brought_to_one_form(path, cleaned):
    assert clean_path(path) == cleaned


@given(st.text(alphabet="a./%2eEfF\0é\ud800", max_size=12))
def test_no_path_climbs_out(path):
    try:
        cleaned = clean_path(path)
    except InvalidArgument:
        return
    assert not cleaned.startswith("/")
    assert all(part not in ("", "..", ".") for part in cleaned.split("/")) or cleaned == ""


@pytest.mark.parametrize(
    ("path", "target", "found"),
    [("a/l", "b", "a/b"), ("a/l", "../b", "b"), ("l", "./a//b", "a/b"), ("a/b/l", "../../c", "c"), ("a/l", "..", "")],
)
def test_links_are_resolved_inside_the_volume(path, target, found):
    assert resolve_link(path, target) == found


@pytest.mark.parametrize("target", ["/etc/passwd", "../../x", "../x/../.."])
def test_links_out_of_the_volume_are_refused(target):
    with pytest.raises(InvalidArgument, match="outside the volume"):
        resolve_link("a/l", target)


@given(st.integers(0, 5 * BLOCK_BYTES), st.integers(0, 5 * BLOCK_BYTES))
def test_slices_cover_a_range_and_cross_no_block_boundary(start, length):
    slices = block_slices(start, length)
    assert sum(part for _, part in slices) == length
    position = start
    for offset, part in slices:
        assert offset == position and 0 < part <= BLOCK_BYTES
        assert offset // BLOCK_BYTES == (offset + part - 1) // BLOCK_BYTES
        position += part


def test_the_last_block_of_a_file_may_be_short():
    assert [num_blocks(size) for size in (0, 1, BLOCK_BYTES, BLOCK_BYTES + 1)] == [0, 1, 1, 2]


def test_tombstones_take_entries_out_of_a_manifest():
    entries = {"a": VolumeEntry("a", EntryKind.FILE), "b": VolumeEntry("b", EntryKind.FILE)}
    merge_pages(entries, [VolumeEntry("a", EntryKind.GONE), VolumeEntry("c", EntryKind.DIRECTORY)])
    assert sorted(entries) == ["b", "c"]
