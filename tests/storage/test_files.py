import errno
import hashlib
import os
import time

import pytest

from aeolian.domain.errors import InvalidArgument, OutOfSpace
from aeolian.storage.files import KEPT_S, ContentStore
from aeolian.storage.receive import check_room


@pytest.fixture
def store(tmp_path) -> ContentStore:
    return ContentStore(tmp_path)


def test_content_is_known_by_its_digest(store, tmp_path):
    digest = hashlib.sha256(b"x").hexdigest()
    assert store.put(b"x", digest) == digest and store.has(digest) and store.read(digest) == b"x"
    (tmp_path / "file").write_bytes(b"y" * 3_000_000)
    digest, size = store.put_file(tmp_path / "file")
    assert store.size_bytes(digest) == size == 3_000_000
    with pytest.raises(InvalidArgument, match="send it again"):
        store.put(b"x", digest)
    assert list(store.incoming.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this host has no /dev/full")
@pytest.mark.parametrize("num_bytes", [10, 3_000_000])
def test_a_full_disk_is_told_as_such(store, tmp_path, monkeypatch, num_bytes):
    (tmp_path / "file").write_bytes(bytes(num_bytes))
    real_open = os.fdopen

    def fdopen(descriptor: int, mode: str):
        os.dup2(full := os.open("/dev/full", os.O_WRONLY), descriptor)
        os.close(full)
        return real_open(descriptor, mode)

    monkeypatch.setattr(os, "fdopen", fdopen)
    for attempt in (lambda: store.put(bytes(num_bytes)), lambda: store.put_file(tmp_path / "file")):
        with pytest.raises(OutOfSpace, match="the server's disk is full"):
            attempt()
    monkeypatch.undo()
    assert list(store.incoming.iterdir()) == []
    assert store.has(store.put(bytes(num_bytes)))


def test_a_disk_without_room_for_a_file_s_name_is_full_too(store, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(OutOfSpace):
        store.put(b"x")


def test_what_does_not_fit_is_refused_before_it_is_sent(tmp_path):
    check_room(tmp_path, 1)
    with pytest.raises(OutOfSpace, match=r"1,152,921,504,606,846,976 bytes are to be stored, and [\d,]+ are free"):
        check_room(tmp_path, 1 << 60)


def test_content_that_nothing_refers_to_is_collected_a_day_after_its_last_use(store):
    referenced, unused, asked_for = store.put(b"1"), store.put(b"2"), store.put(b"3")
    assert store.collect({referenced}, now=time.time() + KEPT_S - 60) == 0
    assert store.collect({referenced, asked_for}, now=time.time() + KEPT_S + 60) == 1
    assert [store.has(digest) for digest in (referenced, unused, asked_for)] == [True, False, True]
    assert store.keep(asked_for) and not store.keep(unused)
