"""`Volume.commit()` and `reload()` of the official client, with a worker that answers them."""

import asyncio
import os
import sys

import modal
import pytest
from storage_server import storage_server

from aeolian.domain.containers import VolumeMountSpec
from aeolian.protocol.volumes import VolumeRpcs
from aeolian.worker.volume_rpcs import WorkerVolumeRpcs
from aeolian.worker.volumes import WorkerVolumes

TASK_OF_PORT = "ta-1"


class RpcsOfOneContainer(VolumeRpcs):
    """All callers are the container ta-1, whose worker answers what it can."""

    worker: WorkerVolumeRpcs

    async def VolumeCommit(self, request, caller):
        return await self.worker.VolumeCommit(request, TASK_OF_PORT)

    async def VolumeReload(self, request, caller):
        return await self.worker.VolumeReload(request, TASK_OF_PORT)


@pytest.fixture
async def server(tmp_path, monkeypatch):
    async with storage_server(tmp_path, monkeypatch, volume_rpcs=RpcsOfOneContainer) as server:
        yield server


@pytest.fixture
async def workers(server, monkeypatch):
    workers = WorkerVolumes(server.root, server.commits)
    await workers.open()
    monkeypatch.setattr(RpcsOfOneContainer, "worker", WorkerVolumeRpcs(workers), raising=False)
    yield workers
    await workers.close()


async def in_container(server, code: str) -> str:
    environment = {
        **os.environ,
        "MODAL_SERVER_URL": server.grpc_url,
        "MODAL_TOKEN_ID": "ak-test",
        "MODAL_TOKEN_SECRET": "as-test",
        "MODAL_CONFIG_PATH": "/dev/null",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_user_code_commits_and_reloads(server, workers):
    volume = modal.Volume.from_name("data", create_if_missing=True, client=server.client)
    await volume.hydrate.aio()
    mine = await workers.attach("ta-1", VolumeMountSpec(volume.object_id, "/data"))
    other = await workers.attach("ta-2", VolumeMountSpec(volume.object_id, "/data"))
    (other / "theirs").write_text("2")
    await workers.commit("ta-2", volume.object_id)
    code = f"""
import modal
volume = modal.Volume.from_name("data")
mine = {str(mine)!r}
open(mine + "/ours", "w").write("1")
volume.commit()
print(open(mine + "/theirs").read())
with open(mine + "/ours") as file:
    try:
        volume.reload()
    except RuntimeError as error:
        print(error)
volume.reload()
print([entry.path for entry in volume.listdir("/")])
"""
    lines = (await in_container(server, code)).splitlines()
    assert lines[0] == "2" and lines[2] == "['ours', 'theirs']"
    assert "there are open files preventing the operation" in lines[1]


async def test_what_clients_upload_and_remove_is_seen_after_a_reload(server, workers):
    volume = modal.Volume.from_name("data", create_if_missing=True, client=server.client)
    await volume.hydrate.aio()
    mine = await workers.attach("ta-1", VolumeMountSpec(volume.object_id, "/data"))
    (mine / "d").mkdir()
    (mine / "d/mine").write_text("1")
    await workers.commit("ta-1", volume.object_id)
    big = os.urandom(9 << 20) + bytes(4 << 20)
    (server.root / "big").write_bytes(big)
    async with volume.batch_upload.aio() as batch:
        batch.put_file(server.root / "big", "/d/big")
    await volume.copy_files.aio(["d/mine"], "copy")
    await volume.remove_file.aio("d/mine")
    await workers.reload("ta-1", volume.object_id)
    assert sorted(os.listdir(mine)) == ["copy", "d"] and os.listdir(mine / "d") == ["big"]
    assert (mine / "d/big").read_bytes() == big
    again = await workers.attach("ta-2", VolumeMountSpec(volume.object_id, "/data"))
    assert (again / "d/big").read_bytes() == big
    with (again / "d/big").open("r+b") as file:
        file.write(b"new")
    await workers.detach("ta-2")
    assert b"".join([chunk async for chunk in volume.read_file.aio("d/big")]) == b"new" + big[3:]


async def test_a_deleted_volume_is_named_to_user_code(server, workers):
    volume = modal.Volume.from_name("data", create_if_missing=True, client=server.client)
    await volume.hydrate.aio()
    with pytest.raises(RuntimeError, match="not mounted here"):
        await volume.commit.aio()
    mine = await workers.attach("ta-1", VolumeMountSpec(volume.object_id, "/data"))
    (mine / "a").write_text("1")
    await modal.Volume.objects.delete.aio("data", client=server.client)
    with pytest.raises(RuntimeError, match=volume.object_id):
        await volume.commit.aio()
