import contextlib
import hashlib
from types import SimpleNamespace

import pytest
from modal_proto import api_pb2

from aeolian.control.mounts import Mounts, UploadedFile
from aeolian.domain.caller import Caller
from aeolian.domain.clock import ManualClock
from aeolian.domain.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from aeolian.protocol.mounts import MountRpcs
from aeolian.storage.database import Database, metadata
from aeolian.storage.files import ContentStore

CALLER = Caller(workspace="local", token_id="ak-1")


class FakeBlobs:
    def __init__(self, folder):
        self.folder = folder

    async def open_path(self, blob_id):
        path = self.folder / blob_id
        if not path.exists():
            raise NotFound(f"no blob {blob_id}")
        return path

    async def delete(self, blob_id):
        (self.folder / blob_id).unlink(missing_ok=True)


class FakeEnvironments:
    def resolve(self, name, caller):
        return SimpleNamespace(id=f"en-{name or 'main'}", name=name or "main")


class FakePythons:
    def __init__(self, folder):
        self.tree = folder
        self.num_asked = 0

    async def folder(self, series, full_version):
        self.num_asked += 1
        if series != "3.12":
            raise NotFound(f"this host has no Python {series}")
        return self.tree


@contextlib.asynccontextmanager
async def opened(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/a.db")
    metadata.create_all(database.engine)
    database.open()
    try:
        yield Mounts(
            database,
            ManualClock(),
            ContentStore(tmp_path / "content"),
            FakeBlobs(tmp_path),
            FakeEnvironments(),
            FakePythons(tmp_path / "python"),
        )
    finally:
        await database.close()


@pytest.fixture
async def mounts(tmp_path):
    async with opened(tmp_path) as mounts:
        yield mounts


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def test_a_file_is_asked_for_once_then_known_by_its_content(mounts):
    assert await mounts.missing([sha(b"x")]) == [sha(b"x")]
    await mounts.put(sha(b"x"), b"x")
    assert await mounts.missing([sha(b"x"), sha(b"y")]) == [sha(b"y")]


async def test_content_that_is_not_what_its_digest_says_is_refused_and_not_stored(mounts, tmp_path):
    (tmp_path / "bl-1").write_bytes(b"other")
    with pytest.raises(InvalidArgument, match="SHA-256"):
        await mounts.put(sha(b"x"), b"other")
    with pytest.raises(InvalidArgument, match="SHA-256"):
        await mounts.put_blob(sha(b"x"), "bl-1")
    assert await mounts.missing([sha(b"other"), sha(b"x")]) == [sha(b"other"), sha(b"x")]
    with pytest.raises(InvalidArgument, match="64"):
        await mounts.put("../../etc/passwd", b"x")


async def test_a_mount_is_made_of_its_files_whatever_their_order(mounts, tmp_path):
    (tmp_path / "bl-1").write_bytes(b"y")
    await mounts.put(sha(b"x"), b"x")
    await mounts.put_blob(sha(b"y"), "bl-1")
    assert not (tmp_path / "bl-1").exists()
    await mounts.put_blob(sha(b"y"), "bl-1")  # a repeated request
    files = [UploadedFile("/root/a.py", sha(b"x"), 0o644), UploadedFile("/root/p/b.py", sha(b"y"), 0o100755)]
    first, second = await mounts.create(files), await mounts.create(reversed(files))
    assert first == second
    assert first.mount_id.startswith("mo-")
    spec = await mounts.spec(first.mount_id)
    assert [(file.path, file.size_bytes, file.mode) for file in spec.files] == [
        ("/root/a.py", 1, 0o644),
        ("/root/p/b.py", 1, 0o755),
    ]
    assert (await mounts.create(files[:1])).mount_id != first.mount_id


async def test_mounts_survive_a_restart(tmp_path):
    async with opened(tmp_path) as mounts:
        await mounts.put(sha(b"x"), b"x")
        mount = await mounts.create([UploadedFile("/root/a.py", sha(b"x"))])
        client = await mounts.lookup_global("modal-client-mount-1.6.4")
    async with opened(tmp_path) as mounts:
        assert (await mounts.spec(mount.mount_id)).files[0].path == "/root/a.py"
        assert await mounts.lookup_global("modal-client-mount-1.6.4") == client


@pytest.mark.parametrize(
    "path",
    [
        "a.py",
        "",
        "/",
        "/root/../etc/passwd",
        "/..",
        "/root//a",
        "/root/./a",
        "/root/a/",
        "//root/a",
        "/a\0b",
        "/" + "x" * 256,
    ],
)
async def test_paths_that_climb_or_are_relative_are_refused_by_name(mounts, path):
    await mounts.put(sha(b"x"), b"x")
    with pytest.raises(InvalidArgument, match="mount path"):
        await mounts.create([UploadedFile(path, sha(b"x"))])


async def test_a_path_cannot_be_file_and_folder(mounts):
    await mounts.put(sha(b"x"), b"x")
    with pytest.raises(InvalidArgument, match="'/root/a' is a file"):
        await mounts.create([UploadedFile("/root/a", sha(b"x")), UploadedFile("/root/a/b", sha(b"x"))])


async def test_a_mount_of_content_that_was_never_uploaded_is_refused(mounts):
    with pytest.raises(FailedPrecondition, match=r"/root/a\.py"):
        await mounts.create([UploadedFile("/root/a.py", sha(b"x"))])


async def test_named_mounts_are_found_in_their_environment_only(mounts):
    await mounts.put(sha(b"x"), b"x")
    files = [UploadedFile("/root/a.py", sha(b"x"))]
    made = await mounts.deploy("m", "", files, CALLER, replace=False)
    assert await mounts.lookup("m", "main", CALLER) == made
    with pytest.raises(NotFound):
        await mounts.lookup("m", "other", CALLER)
    with pytest.raises(AlreadyExists):
        await mounts.deploy("m", "", files, CALLER, replace=False)
    empty = await mounts.deploy("m", "", [], CALLER, replace=True)
    assert await mounts.lookup("m", "", CALLER) == empty != made


async def test_client_mounts_are_stable_objects_for_every_version(mounts):
    first = await mounts.lookup_global("modal-client-mount-1.6.4")
    assert first == await mounts.lookup_global("modal-client-mount-1.6.4")
    assert first != await mounts.lookup_global("modal-client-mount-1.4.3")
    assert (await mounts.spec(first.mount_id)).files == ()
    with pytest.raises(NotFound):
        await mounts.lookup_global("modal-client-mount-../../x")


async def test_a_standalone_python_is_stored_once_under_python(mounts, tmp_path):
    (tmp_path / "python/bin").mkdir(parents=True)
    (tmp_path / "python/bin/python3").write_bytes(b"elf")
    (tmp_path / "python/bin/python3").chmod(0o755)
    name = "python-build-standalone.20240107.3.12.1-gnu"
    mount = await mounts.lookup_global(name)
    assert mount == await mounts.lookup_global(name)
    assert mounts._pythons.num_asked == 1
    [file] = (await mounts.spec(mount.mount_id)).files
    assert (file.path, file.mode) == ("/python/bin/python3", 0o755)
    with pytest.raises(NotFound, match=r"3\.9"):
        await mounts.lookup_global("python-build-standalone.20240107.3.9.1-gnu")


async def test_the_rpcs_answer_as_clients_expect(mounts):
    rpcs = MountRpcs(mounts, ManualClock())
    put = api_pb2.MountPutFileRequest
    assert not (await rpcs.MountPutFile(put(sha256_hex=sha(b"")), CALLER)).exists
    assert (await rpcs.MountPutFile(put(sha256_hex=sha(b""), data=b""), CALLER)).exists
    assert (await rpcs.MountPutFile(put(sha256_hex=sha(b"")), CALLER)).exists
    reply = await rpcs.MountGetOrCreate(
        api_pb2.MountGetOrCreateRequest(
            object_creation_type=api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP,
            app_id="ap-1",
            files=[api_pb2.MountFile(filename="/root/a.py", sha256_hex=sha(b""))],
        ),
        CALLER,
    )
    assert reply.mount_id.startswith("mo-")
    assert len(reply.handle_metadata.content_checksum_sha256_hex) == 64
    request = api_pb2.MountGetOrCreateRequest(
        deployment_name="modal-client-mount-1.6.4", namespace=api_pb2.DEPLOYMENT_NAMESPACE_GLOBAL
    )
    assert (await rpcs.MountGetOrCreate(request, CALLER)).mount_id.startswith("mo-")
    request.object_creation_type = api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING
    with pytest.raises(PermissionDenied):
        await rpcs.MountGetOrCreate(request, CALLER)
    with pytest.raises(InvalidArgument):
        await rpcs.MountGetOrCreate(api_pb2.MountGetOrCreateRequest(), CALLER)


async def test_what_no_mount_holds_is_collected(mounts, monkeypatch):
    for data in (b"held", b"unused"):
        await mounts.put(sha(data), data)
    await mounts.create([UploadedFile("/root/a", sha(b"held"))])
    assert await mounts.collect() == 0
    monkeypatch.setattr("aeolian.storage.files.KEPT_S", -60.0)
    assert await mounts.collect() == 1
    assert await mounts.missing([sha(b"held"), sha(b"unused")]) == [sha(b"unused")]
