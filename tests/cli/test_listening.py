import socket

import pytest

from aeolian.cli import listening
from aeolian.domain.errors import FailedPrecondition, InvalidArgument


def test_loopback_needs_no_tls():
    for host in ("127.0.0.1", "localhost", "127.3.2.1"):
        listening.check_plaintext(host, has_tls=False, is_allowed=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7"])
def test_a_network_address_without_tls_must_be_asked_for_in_so_many_words(host):
    with pytest.raises(InvalidArgument, match="--serve-network-without-tls"):
        listening.check_plaintext(host, has_tls=False, is_allowed=False)
    listening.check_plaintext(host, has_tls=False, is_allowed=True)
    listening.check_plaintext(host, has_tls=True, is_allowed=False)


def test_a_port_in_use_is_said_with_its_user_and_the_remedy():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            FailedPrecondition, match=rf"port {port} on 127.0.0.1 is in use by process \d+.*--grpc-port"
        ):
            listening.listen("127.0.0.1", port, "--grpc-port")


@pytest.mark.parametrize("host", ["::1", "no such host", "192.0.2.77"])
def test_an_address_that_cannot_be_used_is_named(host):
    with pytest.raises(InvalidArgument, match=f"--host {host}"):
        listening.listen(host, 0, "--grpc-port")


def test_connections_wait_in_the_kernel_while_nobody_accepts():
    with listening.listen("127.0.0.1", 0, "--grpc-port") as sock, socket.create_connection(sock.getsockname(), 2):
        pass
