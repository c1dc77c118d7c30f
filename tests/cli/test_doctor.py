import json
import shutil

import pytest
from click.testing import CliRunner

from aeolian.cli import host_report as module
from aeolian.cli.doctor import packages_to_install
from aeolian.cli.host_report import Finding
from aeolian.cli.main import main

GROUPS = ["runtimes", "kernel", "image tools", "registries", "Python", "GPUs", "machine"]


@pytest.fixture
def offline(monkeypatch):
    """Registries answer at once, as the test says."""
    answers: dict[str, tuple[str, str]] = {}

    async def ask(*argv, **kwargs):
        return answers.get(argv[0].rpartition("/")[2], ("no such host", ""))

    monkeypatch.setattr(module, "_ask", ask)
    return answers


def doctor(*argv: str) -> str:
    result = CliRunner().invoke(main, ["doctor", *argv])
    assert result.exit_code == 0, result.output
    return result.output


def findings_of(tmp_path) -> dict[str, dict]:
    found = json.loads(doctor("--json", "--data-dir", str(tmp_path / "data")))
    return {finding["name"]: finding for finding in found["findings"]}


def test_doctor_says_which_runtime_is_taken_and_leaves_no_trace(tmp_path):
    """On this very host, asking what registries it reaches."""
    data_dir = tmp_path / "not/there/yet"
    found = json.loads(doctor("--json", "--data-dir", str(data_dir)))
    assert list(dict.fromkeys(finding["group"] for finding in found["findings"])) == GROUPS
    runtimes = {it["name"]: it for it in found["findings"] if it["group"] == "runtimes"}
    assert list(runtimes) == ["gvisor", "native", "process"]
    assert not runtimes[found["runtime"]]["is_missing"]
    assert [name for name, it in runtimes.items() if "auto" in it["says"]] == [found["runtime"]]
    assert all(it["says"] for it in found["findings"])
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_a_line_for_everything_and_ends_with_what_to_install(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    printed = doctor("--data-dir", str(tmp_path))
    for group in GROUPS:
        assert group[0].upper() + group[1:] in printed.splitlines()
    assert "not installed: it pulls images from registries" in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("To have the rest: apt install ") and "mmdebstrap" in last and "skopeo" in last
    assert last.count("skopeo") == 1


def test_registries_that_do_not_answer_are_said_with_what_happens_without_them(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    found = findings_of(tmp_path)
    assert found["docker.io"]["is_missing"] and "no such host" in found["docker.io"]["says"]
    assert "Debian's packages" in found["docker.io"]["remedy"]
    assert "PIP_INDEX_URL" in found["Python packages"]["remedy"]


def test_registries_that_answer_are_said_to(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    offline.update({"skopeo": ("", "{}"), "uv": ("", "modal==1.6.4\n"), "apt-helper": ("", "")})
    found = findings_of(tmp_path)
    assert found["docker.io"]["says"] == "answers"
    assert found["Python packages"]["says"].endswith("modal==1.6.4")


def test_gpus_are_listed_with_their_memory(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    offline["nvidia-smi"] = ("", "NVIDIA H100 80GB HBM3, 81559 MiB\nNVIDIA H100 80GB HBM3, 81559 MiB\n")
    found = json.loads(doctor("--json", "--data-dir", str(tmp_path)))["findings"]
    gpus = [finding for finding in found if finding["group"] == "GPUs"]
    assert [gpu["name"] for gpu in gpus] == ["0", "1"]
    assert "81559 MiB" in gpus[0]["says"]


def test_a_full_disk_is_pointed_out(tmp_path, offline, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    disk = findings_of(tmp_path)["disk"]
    assert disk["is_missing"] and "1 GiB free" in disk["says"] and "--data-dir" in disk["remedy"]


async def test_a_program_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.05)
    assert await module._ask("sleep", "600") == ("no answer within 0.05 s", "")
    assert (await module._ask("no-such-program"))[0].startswith("no-such-program:")
    assert await module._ask("cat", given="said") == ("", "said")
    problem, _ = await module._ask("sh", "-c", "echo 'level=fatal: dial: no such host' >&2; exit 1")
    assert problem == "no such host"


def test_packages_to_install_are_named_once():
    missing = [Finding("a", "x", "", True, "apt install one"), Finding("b", "y", "", True, "apt install two one")]
    other = [Finding("c", "z", "", True, "start Aeolian with sudo"), Finding("d", "w", "", False, "")]
    assert packages_to_install((*missing, *other)) == ["one", "two"]
