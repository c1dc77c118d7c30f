import os
import subprocess
import sys

import pytest

from aeolian.cli.data_lock import DataLock
from aeolian.domain.errors import FailedPrecondition


def test_a_second_holder_is_refused_by_the_name_of_the_first(tmp_path):
    first, second = DataLock(tmp_path), DataLock(tmp_path)
    assert first.holder is None
    first.acquire()
    with pytest.raises(FailedPrecondition, match=f"already running .*process {os.getpid()}.*--data-dir"):
        second.acquire()
    assert second.holder == os.getpid()
    first.release()
    assert second.holder is None
    second.acquire()
    second.release()


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path):
    code = "import os, sys; from pathlib import Path; from aeolian.cli.data_lock import DataLock;"
    code += "DataLock(Path(sys.argv[1])).acquire(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    lock = DataLock(tmp_path)
    lock.acquire()
    lock.release()
