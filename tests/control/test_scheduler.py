from hypothesis import given
from hypothesis import strategies as st

from aeolian.control.scheduler import WorkerView, impossible, place
from aeolian.domain.containers import Resources


def worker(name: str, *, cpu: int = 2000, memory: int = 4000, gpus: int = 0, used=(0, 0, 0)) -> WorkerView:
    return WorkerView(name, cpu, memory, gpus, *used)


SMALL = Resources(milli_cpu=1000, memory_mb=100)


def test_the_emptiest_worker_is_taken():
    workers = [worker("a", used=(1000, 0, 0)), worker("b"), worker("c", used=(500, 3000, 0))]
    assert place(SMALL, workers, is_needed=False) == "b"


def test_nothing_is_placed_where_no_room_is_left():
    assert place(SMALL, [worker("a", used=(1500, 0, 0))], is_needed=False) is None
    assert place(SMALL, [worker("a", used=(0, 3950, 0))], is_needed=False) is None
    assert place(SMALL, [], is_needed=True) is None


def test_what_asks_for_more_than_a_worker_has_gets_a_whole_one():
    huge = Resources(milli_cpu=64_000, memory_mb=10)
    assert place(huge, [worker("a")], is_needed=False) == "a"
    assert place(huge, [worker("a", used=(125, 10, 0))], is_needed=False) is None


def test_a_needed_container_is_placed_even_where_all_is_full():
    full = [worker("a", used=(9000, 0, 0)), worker("b", used=(8000, 0, 0))]
    assert place(SMALL, full, is_needed=False) is None
    assert place(SMALL, full, is_needed=True) == "b"


def test_gpus_are_never_shared():
    wants = Resources(gpu_count=1)
    assert place(wants, [worker("a", gpus=1, used=(0, 0, 1)), worker("b")], is_needed=True) is None
    assert place(wants, [worker("a", gpus=2, used=(1999, 0, 1))], is_needed=True) == "a"
    assert "more than 2" in impossible(Resources(gpu_count=4), [worker("a", gpus=2)])
    assert "no worker has a GPU" in impossible(wants, [worker("a")])
    assert impossible(wants, [worker("a", gpus=1, used=(0, 0, 1))]) == ""
    assert impossible(wants, []) == ""  # one may still come


sizes = st.integers(0, 8000)
workers = st.lists(
    st.builds(
        WorkerView,
        st.uuids().map(str),
        st.integers(1000, 8000),
        sizes,
        st.integers(0, 4),
        sizes,
        sizes,
        st.integers(0, 4),
    ),
    max_size=5,
)
requests = st.builds(Resources, milli_cpu=sizes, memory_mb=sizes, gpu_count=st.integers(0, 2))


@given(requests, workers, st.booleans())
def test_reservations_fit_unless_the_container_is_needed(request, workers, is_needed):
    chosen = place(request, workers, is_needed=is_needed)
    if chosen is None:
        assert not (is_needed and workers and not request.gpu_count)
        return
    found = next(worker for worker in workers if worker.worker_id == chosen)
    assert request.gpu_count <= max(0, found.num_gpus - found.used_gpus)
    if not is_needed:
        assert min(request.milli_cpu, found.milli_cpu) + found.used_milli_cpu <= found.milli_cpu
