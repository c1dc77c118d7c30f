import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from small_image import make_small_rootfs
from starting import open_place


@pytest.fixture(scope="session")
def small_rootfs(tmp_path_factory) -> Path:
    rootfs = tmp_path_factory.mktemp("small") / "rootfs"
    make_small_rootfs(rootfs)
    return rootfs


@pytest.fixture(scope="session")
def sdk_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sdk")


@pytest.fixture(params=["gvisor", "native", "native from standbys", "process"])
async def place(request, tmp_path, small_rootfs, sdk_dir):
    """Each runtime of this host in turn."""
    name, _, from_standbys = request.param.partition(" ")
    async with open_place(name, tmp_path, small_rootfs, sdk_dir if from_standbys else None) as opened:
        yield opened


@pytest.fixture
async def from_standbys(tmp_path, small_rootfs, sdk_dir):
    async with open_place("native", tmp_path, small_rootfs, sdk_dir) as opened:
        yield opened


@pytest.fixture
async def native(tmp_path, small_rootfs):
    async with open_place("native", tmp_path, small_rootfs) as opened:
        yield opened


@pytest.fixture
async def gvisor(tmp_path, small_rootfs):
    async with open_place("gvisor", tmp_path, small_rootfs) as opened:
        yield opened
