import pytest
from hypothesis import given
from hypothesis import strategies as st

from aeolian.domain.containers import Resources
from aeolian.domain.quotas import Quota, Room, room

SMALL = Resources(milli_cpu=500, memory_mb=256)
LARGE = Resources(milli_cpu=2000, memory_mb=4096, gpu_count=1)


@pytest.mark.parametrize(
    ("quota", "running", "request_", "expected"),
    [
        pytest.param(Quota(max_containers=2), [], SMALL, Room(2, "its quota of 2 containers"), id="all of it"),
        pytest.param(Quota(max_containers=2), [SMALL, SMALL], SMALL, Room(0, "its quota of 2 containers"), id="full"),
        pytest.param(Quota(max_containers=1), [SMALL] * 3, SMALL, Room(0, "its quota of 1 containers"), id="over it"),
        pytest.param(Quota(max_milli_cpu=2000), [SMALL], SMALL, Room(3, "its quota of 2 CPU cores"), id="cores"),
        pytest.param(Quota(max_memory_mb=1024), [SMALL], LARGE, Room(0, "its quota of 1 GiB of memory"), id="memory"),
        pytest.param(Quota(max_gpus=1), [LARGE], LARGE, Room(0, "its quota of 1 GPUs"), id="GPUs"),
    ],
)
def test_the_room_that_a_quota_leaves(quota, running, request_, expected):
    assert room(quota, running, request_) == expected


def test_what_asks_for_no_gpu_needs_no_room_for_one():
    assert room(Quota(max_gpus=1), [LARGE], SMALL).num_containers > 1000


def test_the_tightest_limit_decides():
    assert room(Quota(max_containers=9, max_milli_cpu=1000), [], SMALL) == Room(2, "its quota of 1 CPU cores")


@given(st.integers(1, 20), st.integers(1, 8000), st.integers(1, 9000), st.lists(st.sampled_from([SMALL, LARGE])))
def test_filling_the_room_never_passes_a_limit(containers, milli_cpu, memory_mb, running):
    quota = Quota(max_containers=containers, max_milli_cpu=milli_cpu, max_memory_mb=memory_mb)
    free = room(quota, running, SMALL).num_containers
    after = [*running, *[SMALL] * free]
    if free:
        assert len(after) <= containers
        assert sum(one.milli_cpu for one in after) <= milli_cpu
        assert sum(one.memory_mb for one in after) <= memory_mb
    assert room(quota, after, SMALL).num_containers == 0
