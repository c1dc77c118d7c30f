"""The front: holds the public ports, ends TLS and passes bytes on to the server's sockets.

It listens on sockets that the supervisor opened and keeps open, and on those of web functions, which server and front
both keep (`front_ports`): neither a restart of the server nor one of the front itself refuses a connection.
"""

import argparse
import asyncio
import contextlib
import logging
import resource
import signal
import socket
import ssl
from pathlib import Path

import uvloop

from aeolian.cli import log_output
from aeolian.cli.front_ports import FrontPorts
from aeolian.cli.settings import Settings, load
from aeolian.domain.errors import InvalidArgument
from aeolian.worker.splice import Splice

log = logging.getLogger(__name__)


async def serve(settings: Settings, grpc: socket.socket, http: socket.socket, links: socket.socket) -> None:
    """Pass connections on until SIGTERM."""
    grpc_splice, http_splice = Splice(settings.grpc_socket), Splice(settings.http_socket)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(grpc_splice.close)
        stack.push_async_callback(http_splice.close)
        await grpc_splice.listen(grpc, tls_context(settings, ["h2"]), client_begins=True)
        tls = tls_context(settings, ["http/1.1"])
        await http_splice.listen(http, tls, has_preface=True, client_begins=True)
        await stack.enter_async_context(FrontPorts(links, {settings.http_socket: http_splice}, tls))
        log.info("passing on %s and %s", settings.grpc_url, settings.http_url)
        await stop.wait()


def tls_context(settings: Settings, protocols: list[str]) -> ssl.SSLContext | None:
    """None without a certificate. Raises InvalidArgument when certificate and key do not work together."""
    if settings.tls_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(protocols)
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except OSError as error:  # ssl.SSLError is one
        raise InvalidArgument(
            f"the certificate {settings.tls_certificate} with the key {settings.tls_key} cannot be used: {error}. "
            "Both must be PEM files that belong together, the key without a passphrase"
        ) from error
    return context


def raise_file_limit() -> None:
    """Two descriptors a connection: take what the host allows."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aeolian.cli.front", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--grpc-fd", type=int, required=True)
    parser.add_argument("--http-fd", type=int, required=True)
    parser.add_argument("--links-fd", type=int, required=True)
    arguments = parser.parse_args()
    settings = load(arguments.config)
    log_output.configure("front", settings.log_level, settings.log_format)
    raise_file_limit()
    grpc, http = socket.socket(fileno=arguments.grpc_fd), socket.socket(fileno=arguments.http_fd)
    links = socket.socket(fileno=arguments.links_fd)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, grpc, http, links))


if __name__ == "__main__":
    main()
