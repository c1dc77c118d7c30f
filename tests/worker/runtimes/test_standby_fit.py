from pathlib import Path

import pytest

from aeolian.domain.containers import ContainerSpec, MountFile, MountSpec, Resources
from aeolian.worker.images.store import StoredImage
from aeolian.worker.runtimes.standby_fit import Report, kind_of, misfit

REPORT = Report(
    ready=True,
    read=frozenset(["MODAL_LOGLEVEL", "NOT_SET"]),
    path=("/root", "/pkg", "/usr/local/lib/python3.11", "/usr/local/lib/python3.11/site-packages"),
    modules=frozenset(["modal", "yaml", "types", "asyncio"]),
)
IMAGE = StoredImage("im-1", layers=("a",), python="/usr/local/bin/python3.11")
ENV = {"PATH": "/bin", "HOME": "/root", "PYTHONPATH": "/pkg:/root"}


def spec_of(**fields) -> ContainerSpec:
    whole = {"task_id": "ta-1", "app_id": "ap-1", "function_id": "fu-1", "environment_name": "main", "image_id": "im-1"}
    return ContainerSpec(**{**whole, "sdk_version": "1.6.4", **fields})


def tree(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_user_code_volumes_and_variables_of_its_own_let_a_container_fit(tmp_path):
    layer = tree(tmp_path, "root/app.py", "root/package/types.py", "data/yaml.py")
    wanted = {**ENV, "SECRET": "x", "MODAL_TASK_ID": "ta-1"}
    assert misfit(REPORT, ENV, wanted, [layer], ["/data", "/root/models", "/mnt/yaml"]) == ""


@pytest.mark.parametrize(
    "changed",
    [
        {"MODAL_LOGLEVEL": "DEBUG"},
        {"NOT_SET": ""},
        {"PYTHONPATH": "/pkg:/root:/more"},
        {"PYTHONHASHSEED": "1"},
        {"LD_PRELOAD": "/x.so"},
        {"HOME": "/home/other"},
        {"LC_ALL": "C"},
        {"SSL_CERT_FILE": "/own.pem"},
    ],
)
def test_a_variable_that_an_import_looked_at_makes_a_start_cold(changed):
    (name,) = changed
    assert name in misfit(REPORT, ENV, {**ENV, **changed}, [], [])


def test_a_variable_that_the_standby_has_and_the_container_lacks_makes_a_start_cold():
    assert "PYTHONPATH" in misfit(REPORT, ENV, {"PATH": "/bin", "HOME": "/root"}, [], [])


def test_an_import_that_looks_at_every_variable_makes_all_starts_cold():
    report = Report(ready=True, read=frozenset(["*"]))
    assert misfit(report, ENV, ENV, [], []) != ""


@pytest.mark.parametrize(
    "file",
    [
        "root/yaml.py",
        "root/types.cpython-311.so",
        "root/modal/__init__.py",
        "root/sitecustomize.py",
        "root/usercustomize.py",
        "usr/local/lib/python3.11/site-packages/anything.py",
        "root/.local/lib/python3.11/site-packages/anything.py",
        "lib/x86_64-linux-gnu/libssl.so.3",
        "etc/ld.so.preload",
        "pkg/yaml/__init__.py",
    ],
)
def test_a_mount_that_hides_what_is_imported_makes_a_start_cold(tmp_path, file):
    assert misfit(REPORT, ENV, ENV, [tree(tmp_path, file)], []) != ""


@pytest.mark.parametrize(
    "target", ["/root", "/", "/usr", "/usr/local/lib/python3.11", "/root/yaml", "/pkg", "/lib/own"]
)
def test_a_volume_where_modules_come_from_makes_a_start_cold(target):
    assert misfit(REPORT, ENV, ENV, [], [target]) != ""


def test_containers_of_one_image_are_of_one_kind_whatever_they_may_use():
    one = kind_of(spec_of(), IMAGE)
    assert one is not None
    assert one == kind_of(spec_of(task_id="ta-2", env={"A": "b"}, resources=Resources(memory_mb_max=64)), IMAGE)


@pytest.mark.parametrize(
    "other",
    [
        {"sdk_version": "1.6.3"},
        {"builder_version": "2024.10"},
        {"cwd": "/srv"},
        {"block_network": True},
        {"resources": Resources(gpu_count=1)},
    ],
)
def test_what_a_standby_is_made_with_tells_kinds_apart(other):
    assert kind_of(spec_of(**other), IMAGE) != kind_of(spec_of(), IMAGE)


def test_an_image_that_is_built_again_is_another_kind():
    again = StoredImage("im-1", layers=("b",), python=IMAGE.python)
    assert kind_of(spec_of(), again) != kind_of(spec_of(), IMAGE)


@pytest.mark.parametrize(
    ("fields", "image"),
    [
        ({"argv": ("sh", "-c", "true")}, IMAGE),
        ({"sdk_version": ""}, IMAGE),
        ({"save_image_as": "im-2"}, IMAGE),
        ({"mounts": (MountSpec("mo-1", (MountFile("/pkg/modal/__init__.py", "", 0),)),)}, IMAGE),
        ({}, StoredImage("im-1", layers=("a",))),
    ],
)
def test_commands_builds_and_images_without_python_always_start_cold(fields, image):
    assert kind_of(spec_of(**fields), image) is None
