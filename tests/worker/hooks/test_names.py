import pytest

from aeolian.domain.containers import ContainerSpec
from aeolian.worker.hooks.base import Start
from aeolian.worker.hooks.names import CERTIFICATES_TARGET, NamesHook


@pytest.fixture
def start(tmp_path):
    for name in ("ta-1", "rootfs"):
        (tmp_path / name).mkdir()
    spec = ContainerSpec("ta-1", "ap-1", "fu-1", "main", "im-1")
    return Start(spec, tmp_path / "ta-1", tmp_path / "socket", rootfs=tmp_path / "rootfs")


def targets(start):
    return {bind.target: bind.source for bind in start.binds}


async def test_a_container_knows_its_own_name_beside_the_hosts(start):
    await NamesHook({}).apply(start)
    assert "127.0.1.1\tta-1" in targets(start)["/etc/hosts"].read_text()
    assert "localhost" in targets(start)["/etc/hosts"].read_text()
    assert all(bind.read_only for bind in start.binds)


async def test_certificates_that_the_host_was_told_of_are_trusted_inside_unless_the_image_says_otherwise(
    start, tmp_path
):
    bundle = tmp_path / "company.pem"
    bundle.touch()
    start.env["REQUESTS_CA_BUNDLE"] = "/of/the/image.pem"
    await NamesHook({"SSL_CERT_FILE": str(bundle)}).apply(start)
    assert targets(start)[CERTIFICATES_TARGET] == bundle
    assert start.env["SSL_CERT_FILE"] == CERTIFICATES_TARGET
    assert start.env["REQUESTS_CA_BUNDLE"] == "/of/the/image.pem"


async def test_an_image_with_certificates_keeps_them_where_the_host_was_told_nothing(start):
    folder = start.rootfs / "etc/ssl/certs"
    folder.mkdir(parents=True)
    (folder / "ca-certificates.crt").touch()
    await NamesHook({}).apply(start)
    assert CERTIFICATES_TARGET not in targets(start)
    assert "SSL_CERT_FILE" not in start.env


async def test_without_network_there_is_no_resolver_and_no_name_of_the_host(start, tmp_path):
    spec = ContainerSpec("ta-1", "ap-1", "fu-1", "main", "im-1", block_network=True)
    start = Start(spec, start.folder, start.socket_path, rootfs=start.rootfs)
    await NamesHook({"SSL_CERT_FILE": str(tmp_path / "none")}).apply(start)
    assert set(targets(start)) == {"/etc/hosts"}
