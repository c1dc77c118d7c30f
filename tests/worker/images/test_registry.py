"""Images of a real registry on loopback."""

import asyncio
import os
import shutil
import stat

import pytest

from aeolian.domain.errors import FailedPrecondition, NotFound, PermissionDenied
from aeolian.domain.images import RegistryAccess
from aeolian.worker.images.mode import WHOLE

from .conftest import Workbench, why_no_roots
from .registries import LoopbackRegistry, tar_layer, write_layout

# `user:password`, hashed by bcrypt
HTPASSWD = "user:$2b$05$abcdefghijklmnopqrstuuWG29KuyeAicPCJODk1zjyGvyQUU2awu"
CONFIG = {
    "Env": ["PATH=/opt/bin:/bin", "A=b=c"],
    "WorkingDir": "/srv",
    "Entrypoint": ["/opt/tool"],
    "Cmd": ["--help"],
    "User": "1000:1000",
    "Labels": {"team": "search"},
    "ExposedPorts": {"80/tcp": {}},
    "Volumes": {"/data": {}},
    "StopSignal": "SIGINT",
    "Shell": ["/bin/bash", "-c"],
}
LOWER = tar_layer(
    ("etc", None),
    ("etc/one", "1"),
    ("etc/two", "2"),
    ("full", None),
    ("full/a", "a"),
    ("full/b", "b"),
    ("gone", None),
    ("gone/deep", None),
    ("gone/deep/file", "x"),
    ("link", ("->", "/etc/one")),
    ("hard", ("=", "etc/two")),
    ("owned", "o", {"uid": 1000, "gid": 100, "mode": 0o4750}),
    ("capable", "c", {"pax_headers": {"SCHILY.xattr.user.note": "kept"}}),
)
UPPER = tar_layer(
    ("etc/.wh.two", ""),
    (".wh.gone", ""),
    ("full/.wh..wh..opq", ""),
    ("full/c", "c"),
    ("link", "no link any more"),
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    for tool in ("docker-registry", "skopeo"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    registry = LoopbackRegistry(tmp_path_factory.mktemp("registry") / "r")
    yield registry
    registry.stop()


@pytest.fixture
def puller(tmp_path):
    """A builder that may reach registries."""
    if reason := why_no_roots(tmp_path):
        pytest.skip(reason)
    return Workbench(tmp_path / "own", mode=WHOLE)


async def test_layers_and_configuration_are_taken_over(puller, registry, tmp_path):
    registry.push(write_layout(tmp_path / "layout", [LOWER, UPPER], CONFIG), "team/app:1")
    image = await puller.build(f"FROM {registry.name('team/app:1')}")
    assert image.env == {"PATH": "/opt/bin:/bin", "A": "b=c"}
    assert (image.workdir, image.user, image.stop_signal) == ("/srv", "1000:1000", "SIGINT")
    assert (image.entrypoint, image.cmd, image.shell) == (("/opt/tool",), ("--help",), ("/bin/bash", "-c"))
    assert (image.labels, image.ports, image.volumes) == ({"team": "search"}, ("80/tcp",), ("/data",))
    with puller.mounted(image, tmp_path / "m") as root:
        assert sorted(os.listdir(root)) == ["capable", "etc", "full", "hard", "link", "owned"]
        assert os.listdir(root / "etc") == ["one"]
        assert os.listdir(root / "full") == ["c"]
        assert (root / "link").read_text() == "no link any more"
        assert (root / "hard").read_text() == "2"
        owned = (root / "owned").stat()
        assert (owned.st_uid, owned.st_gid, stat.S_IMODE(owned.st_mode)) == (1000, 100, 0o4750)
        assert os.getxattr(root / "capable", "user.note") == b"kept"


async def test_steps_build_upon_what_was_pulled(puller, registry, tmp_path):
    registry.push(write_layout(tmp_path / "layout", [LOWER, UPPER], CONFIG), "team/base:1")
    image = await puller.build(
        f"FROM {registry.name('team/base:1')} AS base",
        "COPY <<EOF /new/file",
        "text",
        "EOF",
        "FROM scratch",
        "COPY --from=base /full /new /",
        f"COPY --from={registry.name('team/base:1')} /hard /direct",
    )
    with puller.mounted(image, tmp_path / "m") as root:
        assert sorted(os.listdir(root)) == ["c", "direct", "file"]


async def test_layers_compressed_by_zstd_are_unpacked(puller, registry, tmp_path):
    if shutil.which("zstd") is None:
        pytest.skip("needs zstd")
    registry.push(write_layout(tmp_path / "layout", [LOWER], {}, compress="zstd"), "team/zstd:1")
    image = await puller.build(f"FROM {registry.name('team/zstd:1')}")
    with puller.mounted(image, tmp_path / "m") as root:
        assert (root / "etc/two").read_text() == "2"


async def test_a_moved_tag_is_noticed_and_known_layers_are_not_unpacked_again(puller, registry, tmp_path):
    registry.push(write_layout(tmp_path / "old", [LOWER], {}), "team/moving:latest")
    first = await puller.build(f"FROM {registry.name('team/moving')}", image_id="im-1")
    registry.push(write_layout(tmp_path / "new", [LOWER, UPPER], {}), "team/moving:latest")
    second = await puller.build(f"FROM {registry.name('team/moving')}", image_id="im-2")
    assert second.layers[:1] == first.layers
    assert len(second.layers) == 2


async def test_an_image_pulled_before_serves_while_its_registry_is_away(puller, tmp_path, registry):
    own = LoopbackRegistry(tmp_path / "away")
    own.push(write_layout(tmp_path / "layout", [LOWER], CONFIG), "app:1")
    name = own.name("app:1")
    before = await puller.build(f"FROM {name}", image_id="im-1")
    own.stop()
    again = Workbench(puller.data_dir, mode=WHOLE)
    after = await again.build(f"FROM {name}", image_id="im-2")
    assert after.layers == before.layers
    assert "as it was pulled before" in again.log


async def test_a_layer_that_climbs_stays_inside(puller, registry, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    layer = tar_layer(
        ("way", ("->", str(outside))),
        ("way/written", "x"),
        ("../../../../../../../../.." + str(outside) + "/climbed", "x"),
        ("way/.wh.removed", ""),
        ("stolen", ("=", "../../../../etc/passwd")),
    )
    (outside / "removed").write_text("stays")
    registry.push(write_layout(tmp_path / "layout", [layer], {}), "team/evil:1")
    with pytest.raises(FailedPrecondition, match="could not be unpacked"):  # there is no such file to link to
        await puller.build(f"FROM {registry.name('team/evil:1')}")
    assert [path.name for path in outside.iterdir()] == ["removed"]


async def test_images_that_are_not_there_are_told(puller, registry):
    with pytest.raises(NotFound, match="has no image nobody/nothing:7"):
        await puller.build(f"FROM {registry.name('nobody/nothing:7')}")


async def test_an_image_for_another_machine_is_refused(puller, registry, tmp_path):
    registry.push(write_layout(tmp_path / "layout", [LOWER], {}, architecture="s390x"), "team/mainframe:1")
    with pytest.raises(NotFound, match=r"only for linux/s390x"):
        await puller.build(f"FROM {registry.name('team/mainframe:1')}")


async def test_credentials_open_a_private_registry(puller, registry, tmp_path):
    private = LoopbackRegistry(tmp_path / "private", HTPASSWD)
    try:
        private.push(write_layout(tmp_path / "layout", [LOWER], {}), "app:1", "user:password")
        name = private.name("app:1")
        with pytest.raises(PermissionDenied, match="REGISTRY_USERNAME"):
            await puller.build(f"FROM {name}")
        with pytest.raises(PermissionDenied):
            await puller.build(f"FROM {name}", registry=RegistryAccess("user", "wrong"))
        image = await puller.build(f"FROM {name}", registry=RegistryAccess("user", "password"))
        assert image.layers
        with pytest.raises(PermissionDenied):  # they are for FROM's registry alone
            await puller.build("FROM scratch", f"COPY --from={name} /x /", registry=RegistryAccess("user", "password"))
        assert not list((puller.data_dir / "builds").glob("pulled/*")), "who has no credentials gets no kept copy"
    finally:
        private.stop()


async def test_a_registry_that_does_not_answer_is_asked_once(puller):
    num_asked = 0

    async def hang_up(reader, writer):
        nonlocal num_asked
        num_asked += 1
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    name = f"127.0.0.1:{server.sockets[0].getsockname()[1]}/app:1"
    async with server:
        with pytest.raises(FailedPrecondition, match="cannot be reached"):
            await puller.build(f"FROM {name}")
        num_at_first = num_asked
        with pytest.raises(FailedPrecondition, match="cannot be reached"):
            await puller.build(f"FROM {name}")
    assert num_at_first == num_asked > 0
