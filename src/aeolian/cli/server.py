"""The server's process: the services behind three Unix sockets, for clients, for HTTP, and for workers."""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import grpc
import uvloop

from aeolian.cli import log_output
from aeolian.cli.exit_status import errors_end_the_process
from aeolian.cli.front import raise_file_limit
from aeolian.cli.services import Services
from aeolian.cli.settings import Settings, load
from aeolian.protocol.service import ModalService
from aeolian.protocol.token_flows import OPEN_METHODS
from aeolian.storage import migrate

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 << 20
GRPC_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients ping every 30 s, also without calls; grpcio's own rule would send them away.
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_concurrent_streams", 100_000),
    ("grpc.so_reuseport", 0),
]
STOP_GRACE_S = 2.0


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Services(settings) as services:
        server = grpc.aio.server(options=GRPC_OPTIONS)
        service = ModalService(
            services.resources(),
            services.authenticate,
            open_methods=OPEN_METHODS,
            guard=services.guard,
            observe=services.metrics.rpc_answered,
        )
        server.add_generic_rpc_handlers((service, services.command_router, services.worker_calls))
        await services.gateway.start(settings.http_socket)
        await services.links.start(settings.worker_socket)
        try:
            settings.grpc_socket.unlink(missing_ok=True)
            server.add_insecure_port(f"unix:{settings.grpc_socket}")
            await server.start()
            os.chmod(settings.grpc_socket, 0o600)
            log.info("serving on %s", settings.grpc_url)
            gc.collect()
            gc.freeze()
            await stop.wait()
        finally:
            await server.stop(STOP_GRACE_S)
            await service.close()
            await services.links.stop()
            await services.gateway.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aeolian.cli.server", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--wait", action="store_true", help="be loaded, and go on when a line comes in")
    arguments = parser.parse_args()
    if arguments.wait:
        gc.collect()
        gc.freeze()
        if not sys.stdin.readline():
            return  # nobody needs it any more
    settings = load(arguments.config)
    log_output.configure("server", settings.log_level, settings.log_format)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    raise_file_limit()
    with errors_end_the_process():
        migrate.upgrade(settings.database)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))


if __name__ == "__main__":
    main()
