import os
import stat
import subprocess
import sys

import pytest
import tomlkit

from aeolian.cli.connect import Profile, config_path, write_profile
from aeolian.domain.errors import FailedPrecondition, InvalidArgument

OURS = Profile("aeolian", "http://127.0.0.1:9900", "ak-1", "as-2")


def test_a_first_profile_is_written_for_its_owner_alone_and_active(tmp_path):
    path = tmp_path / "modal.toml"
    assert write_profile(path, OURS, activate=False) is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert tomlkit.parse(path.read_text()) == {
        "aeolian": {
            "token_id": "ak-1",
            "token_secret": "as-2",
            "server_url": "http://127.0.0.1:9900",
            "active": True,
        }
    }


def test_other_profiles_and_comments_stay_and_lose_only_their_activity(tmp_path):
    path = tmp_path / "modal.toml"
    path.write_text('# mine\n[work]\ntoken_id = "ak-9"  # the company\ntoken_secret = "as-9"\nactive = true\n')
    assert write_profile(path, OURS, activate=True) == "work"
    text = path.read_text()
    assert "# mine" in text and "# the company" in text
    document = tomlkit.parse(text)
    assert "active" not in document["work"] and document["aeolian"]["active"] is True
    assert document["work"]["token_secret"] == "as-9"


def test_no_activate_leaves_the_active_profile(tmp_path):
    path = tmp_path / "modal.toml"
    path.write_text('[work]\ntoken_id = "ak-9"\nactive = true\n')
    write_profile(path, OURS, activate=False)
    document = tomlkit.parse(path.read_text())
    assert document["work"]["active"] is True and "active" not in document["aeolian"]


def test_connecting_again_replaces_the_profile(tmp_path):
    path = tmp_path / "modal.toml"
    write_profile(path, OURS, activate=True)
    write_profile(path, OURS._replace(token_id="ak-3"), activate=True)
    assert tomlkit.parse(path.read_text())["aeolian"]["token_id"] == "ak-3"


def test_a_profile_of_modal_com_is_never_replaced(tmp_path):
    path = tmp_path / "modal.toml"
    path.write_text('[aeolian]\ntoken_id = "ak-9"\ntoken_secret = "as-9"\n')
    with pytest.raises(FailedPrecondition, match="--profile"):
        write_profile(path, OURS, activate=True)
    assert "as-9" in path.read_text()


@pytest.mark.parametrize("text", ["[broken", 'token_id = "ak"\n'])
def test_a_file_that_is_no_configuration_is_left_alone(tmp_path, text):
    path = tmp_path / "modal.toml"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=r"modal\.toml"):
        write_profile(path, OURS, activate=True)
    assert path.read_text() == text


def test_a_symlinked_configuration_stays_a_symlink(tmp_path):
    (tmp_path / "real.toml").write_text("")
    path = tmp_path / "modal.toml"
    path.symlink_to(tmp_path / "real.toml")
    write_profile(path, OURS, activate=True)
    assert path.is_symlink() and "ak-1" in (tmp_path / "real.toml").read_text()


def test_modal_config_path_is_respected(monkeypatch, tmp_path):
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "x.toml"))
    assert config_path() == tmp_path / "x.toml"


def test_the_client_reads_the_profile_as_it_is_meant(tmp_path):
    path = tmp_path / "modal.toml"
    path.write_text('[work]\ntoken_id = "ak-9"\nactive = true\n')
    write_profile(path, OURS, activate=True)
    code = "from modal.config import config; print(config['server_url'], config['token_id'], config['token_secret'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_")}
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "MODAL_CONFIG_PATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.split() == ["http://127.0.0.1:9900", "ak-1", "as-2"]
