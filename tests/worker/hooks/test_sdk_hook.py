import pytest

from aeolian.domain.containers import ContainerSpec, MountFile, MountSpec
from aeolian.domain.errors import FailedPrecondition
from aeolian.worker.hooks.base import Start
from aeolian.worker.hooks.sdk import SdkHook


class FakeStore:
    def __init__(self, folder):
        self.folder = folder
        (folder / "sitecustomize.py").write_text("# ours")

    async def packages(self, version, series):
        return self.folder

    async def dependencies(self, sdk_version, builder_version, series, libc="manylinux", arch=""):
        return self.folder / f"{builder_version}-{series}-{libc}"


def start_of(tmp_path, **spec):
    rootfs, folder = tmp_path / "rootfs", tmp_path / "ta-1"
    folder.mkdir()
    rootfs.mkdir()
    spec = {
        "task_id": "ta-1",
        "app_id": "ap-1",
        "function_id": "fu-1",
        "environment_name": "main",
        "image_id": "im-1",
        "sdk_version": "1.6.4",
        **spec,
    }
    return Start(ContainerSpec(**spec), folder, folder / "socket", rootfs=rootfs, python="/usr/local/bin/python")


def link(rootfs, path, target):
    (rootfs / path).parent.mkdir(parents=True, exist_ok=True)
    (rootfs / path).symlink_to(target)


async def applied(tmp_path, start):
    await SdkHook(FakeStore(tmp_path)).apply(start)
    return {bind.target: str(bind.source.relative_to(tmp_path)) for bind in start.binds}


async def test_the_python_of_a_docker_image_is_read_off_its_links(tmp_path):
    start = start_of(tmp_path)
    link(start.rootfs, "usr/local/bin/python", "python3")
    link(start.rootfs, "usr/local/bin/python3", "python3.12")
    start.env["PYTHONPATH"] = "/opt/mine:/root"
    assert await applied(tmp_path, start) == {"/pkg": ".", "/__modal/deps": "2025.06-3.12-manylinux"}
    assert start.env["PYTHONPATH"] == "/pkg:/root:/opt/mine"


async def test_absolute_links_stay_inside_the_root_file_system(tmp_path):
    start = start_of(tmp_path)
    link(start.rootfs, "usr/local/bin/python", "/opt/python/bin/python3")
    link(start.rootfs, "opt/python", "/srv/py")
    (start.rootfs / "srv/py/bin").mkdir(parents=True)
    link(start.rootfs, "srv/py/bin/python3", "../real/python3.10")
    (start.rootfs / "lib").mkdir()
    (start.rootfs / "lib/ld-musl-x86_64.so.1").touch()
    assert (await applied(tmp_path, start))["/__modal/deps"] == "2025.06-3.10-musllinux"


async def test_an_unversioned_binary_is_known_by_its_library(tmp_path):
    start = start_of(tmp_path)
    (start.rootfs / "usr/local/bin").mkdir(parents=True)
    (start.rootfs / "usr/local/bin/python").touch()
    (start.rootfs / "usr/local/lib/python3.13").mkdir(parents=True)
    assert (await applied(tmp_path, start))["/__modal/deps"] == "2025.06-3.13-manylinux"


async def test_an_image_without_python_is_refused_with_the_remedy(tmp_path):
    start = start_of(tmp_path)
    start.python = ""
    with pytest.raises(FailedPrecondition, match="add_python"):
        await applied(tmp_path, start)


async def test_images_that_carry_the_dependencies_get_only_the_packages(tmp_path):
    start = start_of(tmp_path, mount_client_dependencies=False)
    link(start.rootfs, "usr/local/bin/python", "python3.12")
    assert await applied(tmp_path, start) == {"/pkg": "."}


async def test_a_client_that_mounts_its_own_sdk_keeps_it(tmp_path):
    mount = MountSpec("mo-1", (MountFile("/pkg/modal/__init__.py", "0" * 64, 0),))
    start = start_of(tmp_path, mounts=(mount,))
    link(start.rootfs, "usr/local/bin/python", "python3.12")
    assert set(await applied(tmp_path, start)) == {"/__modal/site", "/__modal/deps"}
    assert start.env["PYTHONPATH"] == "/pkg:/root:/__modal/site"


async def test_a_container_without_sdk_gets_none(tmp_path):
    start = start_of(tmp_path, sdk_version="")
    assert await applied(tmp_path, start) == {}
