"""`aeolian up`: everything on one machine, in the foreground."""

import asyncio
import os
import re
import signal
import socket
import sys
from pathlib import Path

import click

from aeolian import __version__
from aeolian.cli import listening
from aeolian.cli.data_lock import DataLock
from aeolian.cli.front import tls_context
from aeolian.cli.log_output import LogFormat
from aeolian.cli.settings import RuntimeChoice, Settings, create_folders, save
from aeolian.cli.supervisor import ChildSpec, Supervisor, end_leftovers
from aeolian.cli.terminal import Terminal
from aeolian.domain.errors import InvalidArgument
from aeolian.gateway.otlp import OtlpExporter
from aeolian.storage import migrate
from aeolian.worker import mounting
from aeolian.worker.port_link import listen_for_links

READY_PROBE_S = 0.05
SLOW_START_S = 15.0
WORKER_END_S = 30.0
"""What a worker may take beyond the drain: to end what is left, and to hand over outputs and logs."""


DOMAIN = re.compile(r"(https?://)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*(:[0-9]{1,5})?")


def checked_domain(domain: str) -> str:
    """In the form in which it is compared. Raises InvalidArgument."""
    domain = domain.rstrip("./").lower()
    if domain and (not DOMAIN.fullmatch(domain) or (":" in domain and "://" not in domain)):
        raise InvalidArgument(
            f"--domain {domain} is no domain: write example.com, or https://example.com[:PORT] when a proxy before the "
            "HTTP port ends TLS"
        )
    return domain


def prepare(
    *,
    data_dir: Path,
    host: str,
    grpc_port: int,
    http_port: int,
    web_port: int,
    domain: str,
    runtime: RuntimeChoice,
    database_url: str,
    public_host: str,
    tls_certificate: Path | None,
    tls_key: Path | None,
    serve_network_without_tls: bool,
    max_standbys: int,
    drain_s: float,
    log_retention_days: float,
    log_level: str,
    log_format: LogFormat,
    otlp_endpoint: str,
    trace_sample: float,
) -> tuple[Settings, DataLock, socket.socket, socket.socket]:
    """Check everything that can be wrong, take the data directory and the ports; nothing runs yet.

    Raises what says what is wrong (an AeolianError), having changed nothing that a next try minds.
    """
    if (tls_certificate is None) != (tls_key is None):
        raise InvalidArgument("--tls-certificate and --tls-key belong together: give both or neither")
    if database_url:
        migrate.normalized(database_url)
    if otlp_endpoint:
        OtlpExporter(otlp_endpoint).close()
    listening.check_plaintext(host, has_tls=tls_certificate is not None, is_allowed=serve_network_without_tls)
    data_dir = data_dir.expanduser().absolute()
    create_folders(data_dir)
    lock = DataLock(data_dir / "run")
    lock.acquire()
    try:
        grpc = listening.listen(host, grpc_port, "--grpc-port")
        http = listening.listen(host, http_port, "--http-port")
        domain = checked_domain(domain)
        scheme = "http" if tls_certificate is None else "https"
        reached_at = public_host or listening.public_host(host)
        settings = Settings(
            data_dir=data_dir,
            host=host,
            grpc_port=grpc.getsockname()[1],
            http_port=http.getsockname()[1],
            web_port=web_port,
            domain=domain,
            public_host=reached_at,
            grpc_url=f"{scheme}://{reached_at}:{grpc.getsockname()[1]}",
            http_url=f"{scheme}://{reached_at}:{http.getsockname()[1]}",
            runtime=runtime,
            database_url=database_url,
            tls_certificate=tls_certificate and tls_certificate.expanduser().absolute(),
            tls_key=tls_key and tls_key.expanduser().absolute(),
            max_standbys=max_standbys,
            drain_s=drain_s,
            log_retention_days=log_retention_days,
            log_level=log_level,  # type: ignore[arg-type]
            log_format=log_format,
            otlp_endpoint=otlp_endpoint,
            trace_sample=trace_sample,
        )
        tls_context(settings, ["h2"])
        return settings, lock, grpc, http
    except BaseException:
        lock.release()
        raise


def processes(settings: Settings, grpc: socket.socket, http: socket.socket, links: socket.socket) -> list[ChildSpec]:
    """What `aeolian up` keeps running, in the order of starting; stopped from the last to the first.

    The worker ends first, while the server still takes its outputs and logs.
    """
    config = str(settings.path)
    python = (sys.executable, "-m")
    sockets = {"--grpc-fd": grpc.fileno(), "--http-fd": http.fileno(), "--links-fd": links.fileno()}
    options = [word for option, descriptor in sockets.items() for word in (option, str(descriptor))]
    return [
        ChildSpec(
            "front",
            (*python, "aeolian.cli.front", "--config", config, *options),
            pass_fds=tuple(sockets.values()),
            stop_s=5,
        ),
        ChildSpec("server", (*python, "aeolian.cli.server", "--config", config), stop_s=15, has_spare=True),
        # The worker alone is asked, not killed, when the supervisor dies: it has containers to end.
        ChildSpec(
            "worker",
            (*python, "aeolian.cli.worker", "--config", config),
            death_signal=signal.SIGTERM,
            stop_s=settings.drain_s + WORKER_END_S,
        ),
    ]


async def supervise(settings: Settings, specs: list[ChildSpec], terminal: Terminal) -> None:
    """Run until Ctrl-C or SIGTERM, then drain; a second one ends the drain. Raises GaveUp."""
    # The worker forks beside gRPC's threads, into programs of their own: nothing of gRPC is used after the fork.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    record = settings.run_dir / "processes.json"
    end_leftovers(record, terminal.say)
    supervisor = Supervisor(specs, record, on_line=terminal.line, say=terminal.say)
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            supervisor.kill_now.set()
            terminal.say("ending everything at once")
        else:
            stop.set()
            terminal.say("stopping: what runs may finish (Ctrl-C again ends it at once)")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    welcome = asyncio.ensure_future(_welcome(settings, terminal))
    try:
        await supervisor.run(stop)
    finally:
        welcome.cancel()
        if sys.platform == "linux":
            mounting.unmount_leftovers(settings.data_dir)  # of a worker that had to be killed
        for path in (settings.grpc_socket, settings.http_socket, settings.worker_socket, settings.front_socket):
            path.unlink(missing_ok=True)


async def _welcome(settings: Settings, terminal: Terminal) -> None:
    """Say where it listens, once it answers."""
    try:
        async with asyncio.timeout(SLOW_START_S):
            await _until_it_answers(settings)
    except TimeoutError:
        terminal.say(f"the server is not ready after {SLOW_START_S:g} s; still waiting")
        await _until_it_answers(settings)
    rows = [
        f"Aeolian {__version__} is ready.",
        f"  clients    {settings.grpc_url}",
        f"  web        {settings.http_url}",
        f"  data       {settings.data_dir}",
        "",
        "Let the modal client use it, in another terminal:",
        f"  aeolian connect --data-dir {settings.data_dir}",
        "Ctrl-C stops it.",
    ]
    terminal.show("\n".join(["", *rows, ""]))


async def _until_it_answers(settings: Settings) -> None:
    for path in (settings.grpc_socket, settings.http_socket):
        while True:
            try:
                _reader, writer = await asyncio.open_unix_connection(str(path))
            except OSError:
                await asyncio.sleep(READY_PROBE_S)
                continue
            writer.close()
            break


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=9900, show_default=True, help="0 = any free port.")
@click.option("--http-port", type=click.IntRange(0, 65535), default=9901, show_default=True, help="0 = any free port.")
@click.option(
    "--web-port",
    type=click.IntRange(0, 65535),
    default=9910,
    show_default=True,
    help="The first of the ports of web functions, one for each; 0 = any free ones.",
)
@click.option(
    "--domain",
    default="",
    metavar="NAME",
    help="Give web functions host names below this domain instead, on the HTTP port; https://NAME if a proxy ends TLS.",
)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "gvisor", "native", "process"]),
    default="auto",
    show_default=True,
    help="What containers run in; auto takes the best that this host offers (see `aeolian doctor`).",
)
@click.option("--database", "database_url", default="", metavar="URL", help="postgresql://…; default: SQLite.")
@click.option("--public-host", default="", metavar="NAME", help="Name or address by which clients reach this machine.")
@click.option("--tls-certificate", type=click.Path(path_type=Path), help="PEM file with the certificate chain.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM file with its private key.")
@click.option(
    "--serve-network-without-tls",
    is_flag=True,
    help="Listen on a network address without TLS: tokens, code and data cross that network in the clear.",
)
@click.option(
    "--standbys",
    "max_standbys",
    type=click.IntRange(0, 100),
    default=4,
    show_default=True,
    help="How many containers native may keep started ahead, 45 MB each; 0: every start is cold.",
)
@click.option(
    "--drain-timeout",
    "drain_s",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long running inputs may take to finish after Ctrl-C.",
)
@click.option(
    "--log-retention",
    "log_retention_days",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    metavar="DAYS",
    help="How long output of apps is kept; 0 = for ever.",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one object a line, in the terminal and in the files of D/logs.",
)
@click.option(
    "--otlp-endpoint",
    default="",
    metavar="URL",
    help="Send a trace of each call to this OpenTelemetry collector (OTLP over HTTP), http://127.0.0.1:4318.",
)
@click.option(
    "--trace-sample",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="The share of calls that are traced.",
)
@click.pass_obj
def up(data_dir: Path, **options) -> None:
    """Start Aeolian on this machine, in the foreground."""
    settings, lock, grpc, http = prepare(data_dir=data_dir, **options)
    terminal = Terminal(settings.data_dir / "logs", settings.log_format)
    links = listen_for_links(str(settings.front_socket))
    try:
        save(settings)
        asyncio.run(supervise(settings, processes(settings, grpc, http, links), terminal))
        terminal.say("stopped")
    finally:
        terminal.close()
        for sock in (grpc, http, links):
            sock.close()
        lock.release()
