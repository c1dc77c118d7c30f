import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from running import RunningAeolian, runtimes

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def shared_data_dir():
    """One data directory for all runtimes, so that an image is built once."""
    given = os.environ.get("AEOLIAN_TEST_DATA_DIR")
    if given:
        yield Path(given)
        return
    folder = Path(tempfile.mkdtemp(prefix="aeolian-e2e-"))
    yield folder / "data"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", params=runtimes())
def aeolian(request, shared_data_dir):
    """A running Aeolian, one after another on each runtime that this host offers."""
    running = RunningAeolian(shared_data_dir, request.param).start()
    yield running
    running.stop()
