"""The public addresses: which may be listened on, the sockets themselves, and how others reach them."""

import errno
import ipaddress
import socket

import psutil

from aeolian.domain.errors import FailedPrecondition, InvalidArgument

BACKLOG = 4096


def resolve(host: str) -> str:
    """The IPv4 address to bind. Raises InvalidArgument: the clients' URLs cannot hold IPv6 addresses."""
    try:
        if isinstance(ipaddress.ip_address(host), ipaddress.IPv6Address):
            raise InvalidArgument(
                f"--host {host} is an IPv6 address, which Modal clients cannot put into a URL: name an IPv4 address"
            )
        return host
    except ValueError:
        pass
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise InvalidArgument(f"--host {host} cannot be resolved: {error.strerror or error}") from error


def check_plaintext(host: str, *, has_tls: bool, is_allowed: bool) -> None:
    """Raises InvalidArgument when tokens and code would cross a network in the clear without that being asked for."""
    if has_tls or is_allowed or ipaddress.ip_address(resolve(host)).is_loopback:
        return
    raise InvalidArgument(
        f"--host {host} is reachable from other machines, and without TLS tokens, code and data would cross the "
        "network in the clear.\nGive --tls-certificate and --tls-key, or put a proxy that ends TLS before 127.0.0.1.\n"
        "If the network itself is trusted: --serve-network-without-tls"
    )


def listen(host: str, port: int, option: str) -> socket.socket:
    """A listening socket; port 0 = any free one. Raises FailedPrecondition that names who has the port.

    Listening starts here, so that connections wait in the kernel even while no process accepts them.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((resolve(host), port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise FailedPrecondition(
                f"port {port} on {host} is in use{_used_by(port)}. Stop that, or choose another with {option} "
                "(0 = any free port)"
            ) from error
        if error.errno == errno.EACCES:
            raise FailedPrecondition(
                f"port {port} may not be used by this account: choose one above 1023 with {option}"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise InvalidArgument(f"--host {host} is no address of this machine") from error
        raise InvalidArgument(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock


def public_host(host: str) -> str:
    """How others reach what is bound to `host`: itself, or for 0.0.0.0 the address of this machine's way out."""
    address = ipaddress.ip_address(resolve(host))
    if not address.is_unspecified:
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing: only asks for the route
            return sock.getsockname()[0]
        except OSError:
            return socket.gethostname()


def _used_by(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp4"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""
