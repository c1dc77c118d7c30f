import hashlib
import os
import time

import pytest

from aeolian.domain.errors import InvalidArgument, NotFound, PayloadTooLarge
from aeolian.domain.volumes import BLOCK_BYTES
from aeolian.storage import volume_files
from aeolian.storage.volume_files import VolumeFiles, copy_content


@pytest.fixture
def files(tmp_path):
    return VolumeFiles(tmp_path / "content")


async def chunks(*parts: bytes):
    for part in parts:
        yield part


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data.rstrip(b"\0")).digest()


async def test_a_file_is_complete_when_its_last_block_has_come(files):
    blocks = [os.urandom(BLOCK_BYTES), bytes(BLOCK_BYTES), b"end" + bytes(10)]
    size, sha256s = 2 * BLOCK_BYTES + 13, [sha256(block) for block in blocks]
    assert files.find_blocks(size, sha256s).missing == [0, 2]  # zeros need not be sent
    upload = volume_files.content_of_blocks(size, sha256s)
    await files.receive_block(upload, size, 0, sha256s[0], chunks(blocks[0][:5], blocks[0][5:]))
    with pytest.raises(InvalidArgument, match="SHA-256"):
        await files.receive_block(upload, size, 2, sha256s[2], chunks(b"wrong"))
    assert files.find_blocks(size, sha256s).missing == [2]
    with pytest.raises(PayloadTooLarge):
        await files.receive_block(upload, size, 2, sha256s[2], chunks(b"end" + bytes(11)))
    await files.receive_block(upload, size, 2, sha256s[2], chunks(b"end"))
    content, missing = files.find_blocks(size, sha256s)
    assert missing == [] and files.path(content).read_bytes() == b"".join(blocks)
    assert files.find_blocks(size, sha256s).content == content
    assert list((files.root / "incoming").iterdir()) == []


async def test_a_small_upload_and_a_container_s_file_share_their_content(files):
    data = b"the same"
    upload = volume_files.content_of_blocks(len(data), [sha256(data)])
    await files.receive_block(upload, len(data), 0, sha256(data), chunks(data))
    assert files.find_blocks(len(data), [sha256(data)]).content == files.put_bytes(data)


def test_one_content_has_an_inode_for_each_mode_and_time(files, tmp_path):
    content = files.put_bytes(b"x")
    plain = files.inode(content, 0o644, files.mtime_ns(content))
    assert plain == files.path(content)
    script = files.inode(content, 0o755, 10**18)
    assert script != plain and script == files.inode(content, 0o755, 10**18)
    status = script.stat()
    assert (status.st_mode & 0o777, status.st_mtime_ns, script.read_bytes()) == (0o755, 10**18, b"x")
    with pytest.raises(NotFound):
        files.inode("s" + "0" * 64, 0o644, 0)
    for name in ("../x", "s", "s" + "G" * 64, ""):
        with pytest.raises(InvalidArgument):
            files.path(name)


def test_what_was_looked_for_lately_is_not_collected(files, monkeypatch):
    kept, dropped, named = (files.put_bytes(data) for data in (b"1", b"2", b"3"))
    files.inode(named, 0o700, 1)
    later = time.time() + volume_files.UNUSED_LIFETIME_S + 60
    assert files.collect({kept, named}, later) == 1
    assert files.has(kept) and files.has(named) and not files.has(dropped)
    assert files.collect({kept}, later - 120) == 0 and files.keep(named) and not files.keep(dropped)
    assert files.collect(set(), later) == 3


def test_holes_stay_holes(files, tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        os.pwrite(file.fileno(), b"x", 32 << 20)
    with (tmp_path / "sparse").open("rb") as source, (tmp_path / "copy").open("wb+") as target:
        digest = hashlib.sha256()
        assert copy_content(source.fileno(), target.fileno(), digest) == 64 << 20
    assert digest.digest() == hashlib.sha256((tmp_path / "sparse").read_bytes()).digest()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 4 << 20
