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


@pytest.fixture(params=["native", "process"])
async def place(request, tmp_path, small_rootfs):
    """Each runtime of this host in turn."""
    async with open_place(request.param, tmp_path, small_rootfs) as opened:
        yield opened


@pytest.fixture
async def native(tmp_path, small_rootfs):
    async with open_place("native", tmp_path, small_rootfs) as opened:
        yield opened
