"""The start hook of names and trust: how a container resolves host names, its own too, and whom it trusts.

Containers reach what the host reaches, so they use its resolver and the certificates that it was told of.
"""

import asyncio
import os
import ssl
from collections.abc import Mapping
from pathlib import Path

from aeolian.worker.hooks.base import Bind, Start
from aeolian.worker.images.host_settings import CERTIFICATE_VARIABLES

RESOLVER = "/etc/resolv.conf"
HOSTS = "/etc/hosts"
CERTIFICATES_TARGET = "/__modal/ca-certificates.crt"
DEFAULT_BUNDLES = (
    "etc/ssl/certs/ca-certificates.crt",
    "etc/pki/tls/certs/ca-bundle.crt",
    "etc/ssl/ca-bundle.pem",
    "etc/ssl/cert.pem",
)
LOOPBACK = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


class NamesHook:
    name = "names"

    def __init__(self, environ: Mapping[str, str] = os.environ):
        self._told = _bundle_that_was_set(environ)

    async def apply(self, start: Start) -> None:
        hosts = start.folder / "hosts"
        await asyncio.to_thread(
            hosts.write_text, hosts_file(start.spec.task_id, start.spec.block_network) + start.host_names
        )
        start.binds.append(Bind(hosts, HOSTS))
        if start.spec.block_network:
            return
        if start.resolver is not None:
            start.binds.append(Bind(start.resolver, RESOLVER))
        elif os.path.exists(RESOLVER):
            start.binds.append(Bind(Path(os.path.realpath(RESOLVER)), RESOLVER))
        bundle = self._told
        if bundle is None and start.rootfs is not None and not _has_bundle(start.rootfs):
            bundle = _default_bundle()
        if bundle is not None:
            start.binds.append(Bind(bundle, CERTIFICATES_TARGET))
            for variable in CERTIFICATE_VARIABLES:
                start.env.setdefault(variable, CERTIFICATES_TARGET)

    async def undo(self, start: Start) -> None:
        return None


def hosts_file(hostname: str, block_network: bool) -> str:
    """The host's own names, and the container's."""
    try:
        known = LOOPBACK if block_network else Path(HOSTS).read_text(errors="replace")
    except OSError:
        known = LOOPBACK
    return f"{known.rstrip()}\n127.0.1.1\t{hostname}\n"


def _bundle_that_was_set(environ: Mapping[str, str]) -> Path | None:
    """Somebody told this host whom to trust: containers reach the same proxies and mirrors."""
    for variable in CERTIFICATE_VARIABLES:
        if (path := environ.get(variable)) and os.path.isfile(path):
            return Path(path).resolve()
    return None


def _has_bundle(rootfs: Path) -> bool:
    return any(os.path.lexists(rootfs / place) for place in DEFAULT_BUNDLES)


def _default_bundle() -> Path | None:
    for place in (*(f"/{place}" for place in DEFAULT_BUNDLES), ssl.get_default_verify_paths().openssl_cafile):
        if os.path.isfile(place):
            return Path(place).resolve()
    return None
