"""With a certificate of one's own, clients on the network reach both ports by TLS, and by nothing else."""

import datetime
import ipaddress
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2, api_pb2_grpc
from running import RunningAeolian


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def served():
    """(running Aeolian that listens on every address, its certificate)"""
    folder = Path(tempfile.mkdtemp(prefix="aeolian-tls-"))
    certificate, key = self_signed(folder)
    options = ("--tls-certificate", str(certificate), "--tls-key", str(key), "--host", "0.0.0.0")
    ports = ("--public-host", "localhost", "--grpc-port", "0", "--http-port", "0")
    running = RunningAeolian(folder / "data", "process", *options, *ports).start()
    yield running, certificate
    running.stop()
    shutil.rmtree(folder)


def address_of(url: str) -> str:
    scheme, _, address = url.partition("://")
    assert scheme == "https"
    return address


def test_clients_that_trust_the_certificate_are_served(served):
    running, certificate = served
    environment = running.environment
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    metadata = (
        ("x-modal-token-id", environment["MODAL_TOKEN_ID"]),
        ("x-modal-token-secret", environment["MODAL_TOKEN_SECRET"]),
    )
    with grpc.secure_channel(address_of(environment["MODAL_SERVER_URL"]), credentials) as channel:
        stub = api_pb2_grpc.ModalClientStub(channel)
        stub.ClientHello(Empty(), metadata=metadata, timeout=20)
        blob = stub.BlobCreate(api_pb2.BlobCreateRequest(content_length=3), metadata=metadata, timeout=20)
        trusting = ssl.create_default_context(cafile=certificate)
        upload = urllib.request.Request(blob.upload_url, data=b"abc", method="PUT")
        assert upload.type == "https"
        with urllib.request.urlopen(upload, context=trusting, timeout=20) as reply:
            assert reply.status == 200
        found = stub.BlobGet(api_pb2.BlobGetRequest(blob_id=blob.blob_id), metadata=metadata, timeout=20)
        with urllib.request.urlopen(found.download_url, context=trusting, timeout=20) as reply:
            assert reply.read() == b"abc"


def test_without_tls_or_trust_nobody_is(served):
    running, _ = served
    address = address_of(running.environment["MODAL_SERVER_URL"])
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as error:
        api_pb2_grpc.ModalClientStub(channel).ClientHello(Empty(), timeout=5)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"https://{address}/", timeout=5)


ROUTER = """
    import asyncio
    import sys
    from types import SimpleNamespace

    from modal.exception import AuthError
    from modal.sandbox._task_command_router_client import TaskCommandRouterClient

    async def main():
        async def fetch_access():
            return SimpleNamespace(jwt="none", url=sys.argv[1])

        for is_localhost in (False, True):
            asked = SimpleNamespace(_is_localhost=is_localhost)
            router = await TaskCommandRouterClient.connect(asked, "ta-1", fetch_access)
            try:
                await router.exec_poll("ta-1", "x")
            except AuthError as error:
                print("answered:", error)
            await router.close()

    asyncio.run(main())
"""


def test_the_command_router_is_reached_though_its_client_does_not_negotiate_http_2(served, tmp_path):
    running, certificate = served
    url = running.environment["MODAL_SERVER_URL"]
    printed = running.python(ROUTER, tmp_path, args=(url,), env={"SSL_CERT_FILE": str(certificate)}, timeout_s=60)
    assert printed.count("answered: this is no permission for commands") == 2, "checked, and unchecked on localhost"


def test_a_killed_server_and_front_come_back_behind_tls(served):
    running, certificate = served
    environment = running.environment
    metadata = (
        ("x-modal-token-id", environment["MODAL_TOKEN_ID"]),
        ("x-modal-token-secret", environment["MODAL_TOKEN_SECRET"]),
    )
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    for part in ("server", "front"):
        running.kill(part)
        with grpc.secure_channel(address_of(environment["MODAL_SERVER_URL"]), credentials) as channel:
            api_pb2_grpc.ModalClientStub(channel).ClientHello(
                Empty(), metadata=metadata, timeout=30, wait_for_ready=True
            )
