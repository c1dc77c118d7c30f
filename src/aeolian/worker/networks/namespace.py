"""One network namespace: made, entered for a moment, given an address, closed to all but some networks.

It is held open by a descriptor of the worker, and by the processes in it, so it ends with them: also when the worker
is killed. crun and fork servers find it as `/proc/<worker>/fd/<descriptor>`.
"""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from aeolian.worker.networks.bridge import IP, NFT, PREFIX_LENGTH, Bridge, run
from aeolian.worker.runtimes import view

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
OF_THREAD = "/proc/thread-self/ns/net"
INTERFACE = "eth0"
BACKLOG = 1024


class Namespace:
    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.address = ""
        """Of its `eth0`; "": it has none."""

    @classmethod
    def make(cls) -> "Namespace":
        """With a loopback and nothing else. Raises OSError."""
        with _own_again():
            view.unshare(view.CLONE_NEWNET)
            self = cls(os.open(OF_THREAD, os.O_RDONLY | os.O_CLOEXEC))
            _raise_loopback()
        return self

    @property
    def path(self) -> Path:
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets and processes that this thread makes meanwhile belong to the namespace."""
        with _own_again():
            view.setns(self._descriptor, view.CLONE_NEWNET)
            yield

    def join(self, bridge: Bridge, port: str, address: str) -> None:
        """Give it an `eth0` with this address on the bridge; `port`: the name of the other end. Raises OSError."""
        # A hardware address that follows from the other one: what the host has learnt of it stays true.
        hardware = "02:ae:" + ":".join(f"{part:02x}" for part in ipaddress.IPv4Address(address).packed)
        run(
            [IP, "-batch", "-"],
            f"link add {port} type veth peer name {INTERFACE} address {hardware} netns {self.path}\n"
            f"link set {port} master {bridge.name} up\n"
            f"link set {port} type bridge_slave isolated on\n",
        )
        with self.entered():
            run(
                [IP, "-batch", "-"],
                f"addr add {address}/{PREFIX_LENGTH} dev {INTERFACE}\n"
                f"link set {INTERFACE} up\n"
                f"route add default via {bridge.gateway}\n",
            )
        self.address = address

    def allow_only(self, cidrs: Sequence[str]) -> None:
        """Connections from inside go to these networks alone; what was asked from outside is answered. Raises OSError."""
        with self.entered():
            run([NFT, "-f", "-"], allow_list(cidrs))

    def listen(self, host: str, port: int) -> socket.socket:
        """Raises OSError."""
        with self.entered():
            if not ipaddress.ip_address(host).is_loopback:
                run([IP, "addr", "add", f"{host}/32", "dev", "lo"])
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.bind((host, port))
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        return sock

    def socket(self) -> socket.socket:
        """A TCP socket that connects from inside: to the loopback of the container, too."""
        with self.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def allow_list(cidrs: Sequence[str]) -> str:
    """The rules of a namespace. Raises ValueError for what is no network."""
    networks = [ipaddress.ip_network(cidr, strict=False) for cidr in cidrs]
    v4 = ipaddress.collapse_addresses(network for network in networks if network.version == 4)
    allowed = "\n".join(f"ip daddr {network} accept" for network in v4)
    return f"""table inet aeolian {{
chain output {{
type filter hook output priority filter; policy drop;
oifname "lo" accept
ct state established,related accept
{allowed}
reject with icmpx admin-prohibited
}}
}}
"""


@contextlib.contextmanager
def _own_again() -> Iterator[None]:
    """This thread comes back to the host's network. A thread that cannot must not go on."""
    own = os.open(OF_THREAD, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        try:
            view.setns(own, view.CLONE_NEWNET)
        except OSError:
            os.abort()
        os.close(own)


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
