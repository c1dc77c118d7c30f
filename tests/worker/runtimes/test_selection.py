import shutil

import pytest

from aeolian.worker.runtimes import selection
from aeolian.worker.runtimes.base import RuntimeUnavailable
from aeolian.worker.runtimes.selection import Offer, Selection, choose, find_offer


@pytest.fixture
def offers(monkeypatch):
    """What the host offers, as the test says."""
    said = {
        "gvisor": Offer("gvisor", "runsc is not installed", "apt install runsc"),
        "native": Offer("native"),
        "process": Offer("process"),
    }

    async def find(name, data_dir):
        return said[name]

    monkeypatch.setattr(selection, "find_offer", find)
    return said


async def test_the_best_runtime_that_works_is_taken_and_better_ones_are_explained(offers, tmp_path):
    assert await choose("auto", tmp_path) == Selection("native")
    offers["native"] = Offer("native", "it needs root", "start Aeolian with sudo")
    chosen = await choose("auto", tmp_path)
    assert (chosen.name, [str(offer) for offer in chosen.missing]) == (
        "process",
        ["native is not to be had here: it needs root; start Aeolian with sudo"],
    )


async def test_a_runtime_asked_for_by_name_is_taken_or_refused_with_the_remedy(offers, tmp_path):
    assert (await choose("process", tmp_path)).name == "process"
    with pytest.raises(RuntimeUnavailable, match=r"runsc is not installed; apt install runsc.*--runtime auto"):
        await choose("gvisor", tmp_path)
    with pytest.raises(RuntimeUnavailable, match=r"no runtime 'docker': take one of auto, gvisor, native, process"):
        await choose("docker", tmp_path)


async def test_a_host_that_can_do_nothing_is_told_all_reasons(offers, tmp_path):
    offers["native"] = Offer("native", "it needs root")
    offers["process"] = Offer("process", "it cannot fork")
    with pytest.raises(RuntimeUnavailable, match=r"root.*fork"):
        await choose("auto", tmp_path)


async def test_native_needs_root_crun_and_cgroups(monkeypatch, tmp_path):
    monkeypatch.setattr(selection.sys, "platform", "linux")
    monkeypatch.setattr(selection.os, "geteuid", lambda: 1000)
    assert (await find_offer("native", tmp_path)).remedy == "start Aeolian with sudo"
    monkeypatch.setattr(selection.os, "geteuid", lambda: 0)
    monkeypatch.setattr(selection.shutil, "which", lambda name: None)
    assert (await find_offer("native", tmp_path)).remedy == "apt install crun"
    monkeypatch.setattr(selection.sys, "platform", "darwin")
    assert "Linux" in (await find_offer("native", tmp_path)).problem


async def test_gvisor_needs_runsc(monkeypatch, tmp_path):
    monkeypatch.setattr(selection.sys, "platform", "linux")
    monkeypatch.setattr(selection.os, "geteuid", lambda: 0)
    monkeypatch.setattr(selection, "find_runsc", lambda: None)
    assert "make setup" in (await find_offer("gvisor", tmp_path)).remedy


async def test_native_is_tried_and_the_trial_leaves_nothing(native, tmp_path):
    assert (await find_offer("native", tmp_path)).is_available
    assert not any((tmp_path / "runtime/trial").iterdir())


async def test_gvisor_is_tried_and_the_trial_leaves_nothing(gvisor, tmp_path):
    assert (await find_offer("gvisor", tmp_path)).is_available
    assert not any((tmp_path / "runtime/trial").iterdir())


async def test_what_goes_wrong_in_the_trial_is_the_problem(native, tmp_path, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(selection.shutil, "which", lambda name: "/no/such/program" if name == "true" else which(name))
    offer = await find_offer("native", tmp_path)
    assert "/no/such/program" in offer.problem
