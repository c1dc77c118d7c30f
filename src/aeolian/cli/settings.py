"""Settings of one `aeolian up`, and where things lie in its data directory.

The supervisor writes them to `D/run/settings.json` (mode 0600: a database URL may hold a password); front, server
and worker are started with `--config` naming that file. Nothing else is handed down by flag or environment.
"""

import os
from pathlib import Path
from typing import Literal

import msgspec

from aeolian.cli.log_output import LogFormat
from aeolian.domain.errors import FailedPrecondition, InvalidArgument
from aeolian.domain.web import Site

MAX_PATH_BYTES = 85
"""Of a data directory: a Unix socket's whole path may have 107 on Linux, 103 elsewhere."""
RuntimeChoice = Literal["auto", "gvisor", "native", "process"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every process of one `aeolian up` must agree on."""

    data_dir: Path
    host: str = "127.0.0.1"
    """The address that the front's public sockets are bound to."""
    grpc_port: int
    """Public port of the gRPC face: what MODAL_SERVER_URL names."""
    http_port: int
    """Public port of the HTTP face: blobs, web endpoints."""
    grpc_url: str
    """How clients reach the gRPC face, `http://127.0.0.1:9900`."""
    http_url: str
    """How clients and containers reach the HTTP face; base of every blob URL. No slash at the end."""
    public_host: str = "127.0.0.1"
    """Name or address by which clients reach this machine."""
    web_port: int = 0
    """The first of the ports of web functions; 0 = any free ones."""
    domain: str = ""
    """Web functions have host names below it, on the HTTP port; "" = each has a port."""
    runtime: RuntimeChoice = "auto"
    database_url: str = ""
    """SQLAlchemy URL; "" = SQLite at `D/aeolian.db`. Read `database` instead."""
    tls_certificate: Path | None = None
    """PEM chain with which the front ends TLS on both ports; None = plain HTTP."""
    tls_key: Path | None = None
    max_standbys: int = 4
    """How many containers `native` may keep started ahead; 0: every start is cold."""
    drain_s: float = 60.0
    """How long running inputs may take to finish when everything is stopped."""
    log_retention_days: float = 30.0
    """How long output of apps is kept; 0 = for ever."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = "text"
    otlp_endpoint: str = ""
    """URL of an OpenTelemetry collector that takes traces by OTLP over HTTP; "" = none."""
    trace_sample: float = 1.0
    """The share of calls that are traced."""
    workspace: str = "local"

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'aeolian.db'}"

    @property
    def content_dir(self) -> Path:
        return self.data_dir / "content"

    @property
    def blobs_dir(self) -> Path:
        return self.data_dir / "blobs"

    @property
    def images_dir(self) -> Path:
        return self.data_dir / "images"

    @property
    def layers_dir(self) -> Path:
        return self.data_dir / "layers"

    @property
    def volumes_dir(self) -> Path:
        return self.data_dir / "volumes"

    @property
    def sdk_dir(self) -> Path:
        return self.data_dir / "sdk"

    @property
    def runtime_dir(self) -> Path:
        return self.data_dir / "runtime"

    @property
    def keys_dir(self) -> Path:
        """Keys and tokens, files of mode 0600."""
        return self.data_dir / "keys"

    @property
    def run_dir(self) -> Path:
        """Sockets, lock and this file; mode 0700. Nothing in it outlives a reboot usefully."""
        return self.data_dir / "run"

    @property
    def grpc_socket(self) -> Path:
        """The server's ModalClient service, behind the front."""
        return self.run_dir / "grpc.sock"

    @property
    def http_socket(self) -> Path:
        """The server's gateway, behind the front."""
        return self.run_dir / "http.sock"

    @property
    def front_socket(self) -> Path:
        """Where the server hands the ports of web functions to the front."""
        return self.run_dir / "front.sock"

    @property
    def worker_socket(self) -> Path:
        """Where workers on this machine dial the server."""
        return self.run_dir / "worker.sock"

    @property
    def tunnels_socket(self) -> Path:
        """Where the front passes on what comes to tunnels."""
        return self.run_dir / "tunnels.sock"

    @property
    def ports_socket(self) -> Path:
        """Where the server asks the worker for connections to ports of its containers."""
        return self.run_dir / "ports.sock"

    @property
    def runtime_path(self) -> Path:
        """The name of the runtime that the worker took, for `aeolian status`."""
        return self.run_dir / "runtime"

    @property
    def path(self) -> Path:
        return settings_path(self.data_dir)


def web_site(settings: Settings) -> Site:
    """How clients reach web functions."""
    scheme = settings.http_url.partition(":")[0]
    if not settings.domain:
        return Site(scheme, settings.public_host, first_port=settings.web_port)
    outside, _, domain = settings.domain.rpartition("://")
    domain, _, port = domain.partition(":")
    if outside:  # a proxy before the HTTP port says how it is reached
        return Site(outside, settings.public_host, domain, int(port or 0))
    is_usual = settings.http_port == {"http": 80, "https": 443}[scheme]
    return Site(scheme, settings.public_host, domain, 0 if is_usual else settings.http_port)


def settings_path(data_dir: Path) -> Path:
    return data_dir / "run" / "settings.json"


def load_of(data_dir: Path) -> Settings:
    """The settings of the `aeolian up` that runs on `data_dir`, or ran last. Raises FailedPrecondition."""
    path = settings_path(data_dir.expanduser().absolute())
    if not path.exists():
        raise FailedPrecondition(
            f"no Aeolian was started on {data_dir} yet: run `aeolian up --data-dir {data_dir}`, or name another --data-dir"
        )
    return load(path)


def create_folders(data_dir: Path) -> None:
    """The data directory and what must be private in it. Raises InvalidArgument when it cannot be had."""
    if len(os.fsencode(data_dir)) > MAX_PATH_BYTES:
        raise InvalidArgument(
            f"the path {data_dir} is too long for the Unix sockets in it: name a data directory of up to "
            f"{MAX_PATH_BYTES} bytes with --data-dir"
        )
    try:
        # Inputs, outputs and files of everybody are in there; one that exists keeps the mode its owner gave it.
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("run", "keys"):
            (data_dir / name).mkdir(mode=0o700, exist_ok=True)
            os.chmod(data_dir / name, 0o700)
    except OSError as error:
        raise InvalidArgument(
            f"the data directory {data_dir} cannot be used: {error.strerror or error}. "
            "Name one that you may write to with --data-dir"
        ) from error


def save(settings: Settings) -> Path:
    """Write `D/run/settings.json`, whole or not at all."""
    path = settings.path
    fresh = path.with_suffix(".new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(settings, enc_hook=_encode)))
    fresh.replace(path)
    return path


def load(path: Path) -> Settings:
    """Raises InvalidArgument that names the file and what is wrong in it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Settings, dec_hook=_decode)
    except OSError as error:
        raise InvalidArgument(f"no settings at {path}: {error.strerror or error}") from error
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"{path} is not a settings file of this version of Aeolian: {error}") from error


def _encode(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value))


def _decode(wanted: type, value: object) -> Path:
    if wanted is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(wanted)
