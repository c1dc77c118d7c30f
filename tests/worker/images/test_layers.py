"""Layers are made once, kept whole, and made again only when told or too old."""

import asyncio
import os

import pytest

from aeolian.domain.errors import NotFound
from aeolian.worker.images.layers import LayerMaker, digest_of
from aeolian.worker.images.steps import STDOUT
from aeolian.worker.images.store import ImageStore, StoredImage

KEY = digest_of("a step")


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


class Maker:
    """Makes a tree with one file, and counts."""

    def __init__(self, store):
        self.layers = LayerMaker(store)
        self.num_runs = 0
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.has_begun = asyncio.Event()

    async def work(self, folder, on_log):
        self.num_runs += 1
        self.has_begun.set()
        on_log(STDOUT, f"run {self.num_runs}\n")
        await self.may_go_on.wait()
        (folder / "tree").mkdir()
        (folder / "tree/file").write_text(str(self.num_runs))
        return folder / "tree"

    async def make(self, on_log=lambda fd, text: None, **options):
        return await self.layers.make(KEY, self.work, on_log, **options)


async def test_a_layer_is_made_once_also_after_a_restart(store, tmp_path):
    maker = Maker(store)
    first = await maker.make()
    again = await maker.make()
    restarted = Maker(ImageStore(tmp_path))
    after = await restarted.make()
    assert (first.is_cached, again.is_cached, after.is_cached) == (False, True, True)
    assert first.name == again.name == after.name
    assert (maker.num_runs, restarted.num_runs) == (1, 0)


async def test_a_fresh_layer_does_not_replace_the_old_one(store):
    maker = Maker(store)
    old = await maker.make()
    new = await maker.make(fresh=True)
    assert (await maker.make()).name == new.name != old.name
    assert (store.layers_folder / old.name / "file").read_text() == "1"
    assert (store.layers_folder / new.name / "file").read_text() == "2"


async def test_a_layer_that_is_too_old_is_made_again(store):
    maker = Maker(store)
    old = await maker.make(max_age_s=3600)
    assert (await maker.make(max_age_s=3600)).is_cached
    made = store.layers_folder / ".made" / KEY
    os.utime(made, (made.stat().st_atime, made.stat().st_mtime - 3601))
    new = await maker.make(max_age_s=3600)
    assert not new.is_cached
    assert new.name != old.name
    assert store.has_layer(old.name)


async def test_a_layer_that_somebody_deleted_is_made_again(store):
    maker = Maker(store)
    name = (await maker.make()).name
    store.discard(store.layers_folder / name)
    assert (await maker.make()).name == name
    assert maker.num_runs == 2


async def test_a_step_that_changes_nothing_makes_no_layer_and_does_not_run_again(store):
    maker = LayerMaker(store)
    num_runs = 0

    async def work(folder, on_log):
        nonlocal num_runs
        num_runs += 1
        if num_runs == 1:
            (folder / "tree").mkdir()
            return folder / "tree"
        return None

    assert (await maker.make(KEY, work, print)).name == ""
    assert (await maker.make(KEY, work, print)).is_cached
    assert (await maker.make(KEY, work, print, fresh=True)).name == ""
    assert num_runs == 2


async def test_all_who_wait_for_a_layer_hear_it_and_get_it(store):
    maker = Maker(store)
    maker.may_go_on.clear()
    heard = [[], [], []]
    tasks = []
    for listener in heard:
        tasks.append(asyncio.create_task(maker.make(lambda fd, text, listener=listener: listener.append(text))))
        await maker.has_begun.wait()
        await asyncio.sleep(0)
    maker.may_go_on.set()
    layers = await asyncio.gather(*tasks)
    assert len({layer.name for layer in layers}) == 1
    assert maker.num_runs == 1
    assert heard[0] == ["run 1\n"]
    assert "waiting for it" in heard[1][0]


async def test_a_failure_reaches_all_who_wait_and_leaves_nothing(store):
    begun, may_fail = asyncio.Event(), asyncio.Event()
    layers = LayerMaker(store)

    async def work(folder, on_log):
        (folder / "half").touch()
        begun.set()
        await may_fail.wait()
        raise NotFound("no such thing")

    tasks = [asyncio.create_task(layers.make(KEY, work, lambda fd, text: None)) for _ in range(2)]
    await begun.wait()
    may_fail.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in errors] == ["no such thing"] * 2
    assert not list(store.layers_folder.glob(".new-*"))
    assert store.made_by(KEY) is None


async def test_a_layer_is_given_up_only_when_nobody_waits_any_more(store):
    maker = Maker(store)
    maker.may_go_on.clear()
    first = asyncio.create_task(maker.make())
    await maker.has_begun.wait()
    second = asyncio.create_task(maker.make())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    maker.may_go_on.set()
    assert (await second).name
    maker.may_go_on.clear()
    maker.has_begun.clear()
    alone = asyncio.create_task(maker.make(fresh=True))
    await maker.has_begun.wait()
    alone.cancel()
    await asyncio.wait([alone])
    assert alone.cancelled()
    assert not list(store.layers_folder.glob(".new-*"))


def test_equal_steps_have_equal_digests_whatever_the_order_of_their_variables():
    assert digest_of("run", {"A": "1", "B": "2"}) == digest_of("run", {"B": "2", "A": "1"})
    assert digest_of("run", ["a", "b"]) != digest_of("run", ["ab"])


# ---- the store ------------------------------------------------------------------------------------------


def test_images_are_kept_over_restarts(store, tmp_path):
    image = StoredImage("im-1", env={"A": "1"}, cmd=("sleep", "1"))
    store.put(image)
    assert ImageStore(tmp_path).get("im-1") == image
    assert store.ids() == ["im-1"]
    store.delete("im-1")
    assert not store.has("im-1")


def test_an_image_whose_layers_are_gone_is_not_there(store):
    store.put(StoredImage("im-1", layers=("missing",)))
    store = ImageStore(store.layers_folder.parent)
    with pytest.raises(NotFound, match="build it again"):
        store.get("im-1")


@pytest.mark.parametrize("image_id", ["", "../x", "im-../../x", "fu-1", "im-", "im-a/b"])
def test_what_is_no_image_id_is_not_looked_for(store, image_id):
    with pytest.raises(NotFound):
        store.get(image_id)


async def test_what_a_container_wrote_becomes_a_layer_without_our_own_mount_points(store, tmp_path):
    store.put(StoredImage("im-1", env={"A": "1"}))
    upper = tmp_path / "upper"
    for name in ("__modal/volumes/vo-1", "pkg", "tmp", "opt/kept", "etc"):
        (upper / name).mkdir(parents=True)
    (upper / "opt/kept/file").write_text("x")
    (upper / "etc/resolv.conf").touch()
    await store.commit_upper("im-2", "im-1", upper)
    image = store.get("im-2")
    (topmost,) = store.layer_paths(image)
    assert image.env == {"A": "1"}
    assert sorted(str(path.relative_to(topmost)) for path in topmost.rglob("*")) == ["opt", "opt/kept", "opt/kept/file"]
    assert not list(store.layers_folder.glob(".new-*"))


def test_what_a_killed_builder_left_is_cleared(store):
    folder = store.new_folder()
    (folder / "work/work").mkdir(parents=True)
    (folder / "work/work").chmod(0)
    store.clear_leftovers()
    assert not folder.exists()


def test_images_over_the_host_are_told_apart_and_broken_ones_are_not_listed(tmp_path):
    store = ImageStore(tmp_path)
    (store.layers_folder / "there").mkdir()
    store.put(StoredImage("im-1", layers=("there",)))
    store.put(StoredImage("im-2", layers=("there",), over_host=True))
    store.put(StoredImage("im-3", layers=("gone",)))
    again = ImageStore(tmp_path)
    assert again.ids() == ["im-1", "im-2"]
    assert again.ids(over_host=False) == ["im-1"]
