"""What a build step is shown of the host's settings."""

import pytest

from aeolian.worker.images.host_settings import FOLDER, build_settings


@pytest.fixture
def host(tmp_path):
    """A home with pip settings, a local index and a bundle of certificates."""
    (tmp_path / "home/.config/pip").mkdir(parents=True)
    (tmp_path / "pypi/simple").mkdir(parents=True)
    (tmp_path / "pypi/files").mkdir()
    (tmp_path / "wheels").mkdir()
    (tmp_path / "bundle.crt").write_text("certificates")
    (tmp_path / "constraints.txt").write_text("six<2\n")
    (tmp_path / "home/.config/pip/pip.conf").write_text(
        f"[global]\nindex-url = https://mirror.example/simple\nextra-index-url = file://{tmp_path}/pypi/simple\n"
        f"find-links = {tmp_path}/wheels\nconstraint = {tmp_path}/constraints.txt\ncert = /host/only.pem\n"
        "cache-dir = /host/cache\n"
    )
    return tmp_path


def settings_of(host, **environ):
    return build_settings({"HOME": str(host / "home"), **environ})


def test_pips_settings_become_one_file_without_the_hosts_own_places(host):
    settings = settings_of(host)
    config = settings.files[settings.env["PIP_CONFIG_FILE"]]
    assert "index-url = https://mirror.example/simple" in config
    assert "/host/only.pem" not in config
    assert "/host/cache" not in config


def test_files_that_a_setting_names_are_shown(host):
    settings = settings_of(host, PIP_CONSTRAINT=str(host / "constraints.txt"))
    inside = f"{FOLDER}/settings{host}/constraints.txt"
    assert settings.files[inside] == "six<2\n"
    assert f"constraint = {inside}" in settings.files[settings.env["PIP_CONFIG_FILE"]]
    assert settings.env["PIP_CONSTRAINT"] == inside


def test_local_indexes_are_shown_with_the_files_beside_them(host):
    shown = {target: read_only for _, target, read_only in settings_of(host).binds}
    assert shown[str(host / "pypi")]
    assert shown[str(host / "wheels")]


def test_uv_hears_the_same_as_pip(host):
    env = settings_of(host).env
    assert env["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert str(host / "wheels") in env["UV_FIND_LINKS"]


def test_the_certificates_that_this_host_trusts_are_shown_to_every_tool(host):
    settings = settings_of(host, REQUESTS_CA_BUNDLE=str(host / "bundle.crt"))
    bundle = settings.env["SSL_CERT_FILE"]
    assert (str(host / "bundle.crt"), bundle, True) in settings.binds
    assert {settings.env[name] for name in ("PIP_CERT", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")} == {bundle}


def test_proxies_are_passed_on_and_nothing_else_of_the_environment(host):
    env = settings_of(host, https_proxy="http://proxy:3128", AWS_SECRET_ACCESS_KEY="secret").env
    assert env["https_proxy"] == "http://proxy:3128"
    assert "AWS_SECRET_ACCESS_KEY" not in env
    assert "HOME" not in env


def test_caches_of_installers_stay_out_of_the_layer(host):
    env = settings_of(host, PIP_CACHE_DIR="/host/cache").env
    assert env["PIP_CACHE_DIR"].startswith(FOLDER)
    assert env["UV_CACHE_DIR"].startswith(FOLDER)
