"""The worker's bridge: the host's end of its containers' networks, and the rules of what may pass.

::

    container: lo, eth0 ==veth== port of the bridge (isolated from the others) -- host --masquerade--> outside

The bridge and the table of rules are named after the data directory: a worker that starts again finds what a killed
predecessor left, and replaces it. The ports go by themselves, with the namespaces of their containers.
"""

import hashlib
import ipaddress
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

IP, NFT = "ip", "nft"
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
PREFIX_LENGTH = 20
"""4,094 addresses a worker."""
POOL = ipaddress.IPv4Network("10.0.0.0/8")
LINK_LOCAL = "169.254.0.0/16"
DNS_PORT = 53
COMMAND_TIMEOUT_S = 10.0


class Bridge(msgspec.Struct, frozen=True):
    """`name`: of the link and of the table of rules. The first address of `subnet` is the host's."""

    name: str
    subnet: str

    @property
    def gateway(self) -> str:
        return str(next(ipaddress.IPv4Network(self.subnet).hosts()))

    def addresses(self) -> list[str]:
        """Those of containers."""
        return [str(address) for address in ipaddress.IPv4Network(self.subnet).hosts()][1:]


def bridge_name(data_dir: Path) -> str:
    """Of up to 15 characters, as the names of links are."""
    return f"aeo{hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:8]}"


def problem_here() -> str:
    """Why this host gives containers no networks of their own, or ""."""
    if sys.platform != "linux":
        return f"{sys.platform} has no network namespaces"
    if os.geteuid() != 0:
        return f"it needs root, this is user {os.geteuid()}"
    if missing := missing_packages():
        return f"{' and '.join(missing)} must be installed"
    return ""


def missing_packages() -> list[str]:
    """Debian's names."""
    return [package for program, package in ((IP, "iproute2"), (NFT, "nftables")) if shutil.which(program) is None]


def set_up(name: str, avoid: Iterable[str], host_ports: Sequence[tuple[str, str]]) -> Bridge:
    """Make the bridge and its rules anew. Raises OSError with what the host said.

    `avoid`: addresses that containers must reach, so they cannot be theirs. `host_ports`: addresses and TCP ports
    (`80`, `9910-9999`) of the host that containers may connect to; all others are closed to them.
    """
    remove(name)
    bridge = Bridge(name, str(free_subnet(name, [*_routed(), *avoid])))
    run(
        [IP, "-batch", "-"],
        f"link add {name} type bridge forward_delay 0\n"
        f"addr add {bridge.gateway}/{PREFIX_LENGTH} dev {name}\n"
        f"link set {name} up\n",
    )
    run([NFT, "-f", "-"], rules(bridge, host_ports))
    if FORWARDING.read_text().strip() == "0":
        FORWARDING.write_text("1")
    return bridge


def remove(name: str) -> None:
    """Also what is there in part. Never raises."""
    for command in ([IP, "link", "delete", name], [NFT, "delete", "table", "inet", name]):
        try:
            subprocess.run(command, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue


def rules(bridge: Bridge, host_ports: Sequence[tuple[str, str]]) -> str:
    """Containers reach the outside, but neither one another nor the host; nobody outside reaches them.

    Link-local addresses are those of a cloud's metadata, credentials of the host among them; its resolver may be there.
    """
    name = f'"{bridge.name}"'
    offered = "\n".join(f"iifname {name} ip daddr {host} tcp dport {port} accept" for host, port in host_ports)
    return f"""table inet {bridge.name} {{
chain outside {{
type nat hook postrouting priority srcnat; policy accept;
ip saddr {bridge.subnet} oifname != {name} masquerade
}}
chain forward {{
type filter hook forward priority filter; policy accept;
iifname {name} oifname {name} reject with icmpx admin-prohibited
iifname {name} ip daddr {LINK_LOCAL} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept
iifname {name} ip daddr {LINK_LOCAL} reject with icmpx admin-prohibited
oifname {name} ct state established,related accept
oifname {name} drop
}}
chain input {{
type filter hook input priority filter; policy accept;
iifname {name} ct state established,related accept
iifname {name} ip protocol icmp accept
iifname {name} ip daddr {bridge.gateway} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept
{offered}
iifname {name} reject with icmpx admin-prohibited
}}
}}
"""


def free_subnet(name: str, taken: Iterable[str]) -> ipaddress.IPv4Network:
    """The first, from a place that the name decides, that overlaps with nothing. Raises OSError when there is none."""
    used = [network for network in map(_network, taken) if network is not None and network.prefixlen]
    size = 1 << (32 - PREFIX_LENGTH)
    count = POOL.num_addresses // size
    first = int(hashlib.sha256(name.encode()).hexdigest(), 16) % count
    for number in range(count):
        start = int(POOL.network_address) + (first + number) % count * size
        subnet = ipaddress.IPv4Network((start, PREFIX_LENGTH))
        if not any(subnet.overlaps(network) for network in used):
            return subnet
    raise OSError(f"every part of {POOL} is in use on this host")


def _network(text: str) -> ipaddress.IPv4Network | None:
    try:
        return ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        return None


def _routed() -> list[str]:
    return [route["dst"] for route in json.loads(run([IP, "-4", "-json", "route", "show", "table", "all"]) or "[]")]


def run(command: Sequence[str], given: str = "") -> str:
    """Raises OSError with the program's own words."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"`{' '.join(command)}` did not end within {COMMAND_TIMEOUT_S:g} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(f"`{' '.join(command)}`: {said[0] if said else f'exit status {done.returncode}'}")
    return done.stdout
