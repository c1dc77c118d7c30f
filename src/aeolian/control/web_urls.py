"""Web URLs: what label a web function has, at which host or port it is reached, and who answers there now.

A label follows from names alone, so that it survives redeployments: `{workspace}[-{environment}]--{app}-{function}`,
with a suffix for apps that are not deployed. With a domain it is the first part of the host; without one it has a
port of its own, which it keeps for as long as anybody remembers it.

::

    claim --> label --(domain)--> https://label.domain          the newest Function that claimed the label, and that
                  \\---(none)----> http://host:port  (stored)     still has it at its current definition, answers
"""

import asyncio
import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec
from modal_proto import api_pb2

from aeolian.control import definitions
from aeolian.control.apps import Apps
from aeolian.control.definitions import WebAddress, WebFunction
from aeolian.control.environments import Environments
from aeolian.control.functions import Functions
from aeolian.domain.apps import AppState
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import AeolianError, ResourceExhausted
from aeolian.domain.web import MAX_PORTS, Site
from aeolian.storage import web_urls as storage
from aeolian.storage.database import Database
from aeolian.storage.web_urls import WebClaim, WebLabel

log = logging.getLogger(__name__)

MAX_LABEL_LENGTH = 63
"""Of a part of a host name (RFC 1035)."""
HASH_LENGTH = 6
FORGET_S = 30 * 24 * 3600.0
"""How long a label that nobody has any more keeps its port."""
DEFAULT_DEV_SUFFIX = "dev"
NO_ADDRESS = WebAddress("")


class Ports(Protocol):
    """Who listens on public ports (`gateway.listeners`)."""

    def open(self, port: int) -> int | None:
        """Listen there (0 = any free one). Returns the port, or None when somebody else has it."""
        ...

    def close(self, port: int) -> None: ...


class WebTarget(NamedTuple):
    """Who answers at a label."""

    label: str
    function_id: str
    method_name: str
    app_id: str
    workspace: str
    environment_id: str
    definition: api_pb2.Function

    @property
    def webhook(self) -> api_pb2.WebhookConfig:
        if self.method_name:
            return self.definition.method_definitions[self.method_name].webhook_config
        return self.definition.webhook_config


class WebUrls:
    def __init__(
        self, database: Database, clock: Clock, apps: Apps, environments: Environments, ports: Ports, site: Site
    ):
        self.functions: Functions
        """Set by whoever makes both."""
        self._database = database
        self._clock = clock
        self._apps = apps
        self._environments = environments
        self._ports = ports
        self._site = site
        self._labels: dict[str, WebLabel] = {}
        self._at_port: dict[int, str] = {}
        self._claims: dict[str, list[WebClaim]] = {}
        """By label, the newest last."""
        self._claiming = asyncio.Lock()
        apps.when_ended.append(self._app_ended)

    async def load(self) -> None:
        """Read what was claimed, and listen where people expect somebody. Needs loaded `functions`."""
        living = {app.app_id for app in self._apps.living_apps()}
        claims = await self._database.read(storage.all_claims)
        gone = {claim.app_id for claim in claims} - living
        for claim in claims:
            if claim.app_id in living:
                self._claims.setdefault(claim.label, []).append(claim)
        labels = await self._database.read(storage.all_labels)
        horizon = self._clock.now() - FORGET_S
        forgotten = [one.label for one in labels if one.label not in self._claims and one.used_at < horizon]

        def delete(connection) -> None:
            storage.delete_claims_of(connection, gone)
            storage.delete_labels(connection, forgotten)

        if gone or forgotten:
            await self._database.write(delete)
        for label in labels:
            if label.label not in forgotten:
                self._labels[label.label] = label
        if not self._site.domain:
            await self._listen_again()

    # ---- addresses --------------------------------------------------------------------------------------

    def address_of(self, web: WebFunction) -> WebAddress:
        """Where a web function is reached; without a URL when it was never claimed."""
        name = self._name_of(web)
        known = self._labels.get(name.label) if name is not None else None
        if name is None or known is None:
            return NO_ADDRESS
        newest = next(reversed(self._claims.get(name.label, ())), None)
        is_stolen = newest is not None and newest.function_id == web.function_id and self._has_rival(newest)
        return WebAddress(self._site.url(known.label, known.port), name.is_truncated, is_stolen)

    async def claim(self, webs: Sequence[WebFunction]) -> None:
        """Give each of them its address. Durable when this returns. Raises ResourceExhausted when ports are short."""
        async with self._claiming:
            now, labels, claims = self._clock.now(), [], []
            for web in webs:
                name = self._name_of(web)
                if name is None:
                    continue
                newest = next(reversed(self._claims.get(name.label, ())), None)
                if newest is not None and (newest.function_id, newest.method_name) == (
                    web.function_id,
                    web.method_name,
                ):
                    continue
                known = self._labels.get(name.label)
                port = known.port if known is not None else 0
                if not self._site.domain and port not in self._at_port:
                    port = self._new_port()
                labels.append(WebLabel(name.label, port, now))
                claims.append(WebClaim(name.label, web.function_id, web.method_name, web.app_id, now))
                self._keep(labels[-1])
            if not claims:
                return

            def store(connection) -> None:
                for label in labels:
                    storage.put_label(connection, label)
                storage.put_claims(connection, claims)

            await self._database.write(store)
            for claim in claims:
                others = [one for one in self._claims.get(claim.label, ()) if not _is_same(one, claim)]
                self._claims[claim.label] = [*others, claim]

    # ---- who answers ------------------------------------------------------------------------------------

    def at_port(self, port: int) -> WebTarget | None:
        """None: nobody does (any more)."""
        label = self._at_port.get(port)
        return self._target(label) if label is not None else None

    def is_ours(self, port: int) -> bool:
        """Whether a port is one of web functions, whoever answers there."""
        return port in self._at_port

    def at_host(self, host: str) -> WebTarget | None:
        """`host`: as in the Host header, with or without a port."""
        label = self.label_in(host)
        return self._target(label) if label else None

    def label_in(self, host: str) -> str:
        """The label in a host name below the domain; "" for the domain itself and for others' names."""
        domain = self._site.domain
        name = host.partition(":")[0].rstrip(".").lower()
        if not domain or not name.endswith(f".{domain}"):
            return ""
        return name.removesuffix(f".{domain}")

    def _target(self, label: str) -> WebTarget | None:
        for claim in reversed(self._claims.get(label, ())):
            app = self._apps.known(claim.app_id)
            if app is None:
                continue
            try:
                self.functions.check_callable(claim.function_id, Caller(workspace=app.workspace))
                definition = self.functions.current(claim.function_id).function
            except AeolianError:
                continue
            for web in definitions.web_functions(definition, claim.function_id, claim.app_id):
                name = self._name_of(web)
                if web.method_name == claim.method_name and name is not None and name.label == label:
                    return WebTarget(
                        label,
                        claim.function_id,
                        claim.method_name,
                        claim.app_id,
                        app.workspace,
                        app.environment_id,
                        definition,
                    )
        return None

    # ---- inside -----------------------------------------------------------------------------------------

    def _name_of(self, web: WebFunction) -> "Label | None":
        app = self._apps.known(web.app_id)
        if app is None:
            return None
        environment = self._environments.by_id(app.environment_id)
        return label_of(
            web,
            workspace=app.workspace,
            web_suffix=environment.web_suffix if environment is not None else "",
            app_name=app.name or app.description or app.app_id,
            is_deployed=bool(app.name) or app.state is AppState.INITIALIZING,
        )

    def _has_rival(self, claim: WebClaim) -> bool:
        """Whether another app's living Function had the label before."""
        return any(
            other.app_id != claim.app_id and (app := self._apps.known(other.app_id)) is not None and not app.has_ended
            for other in self._claims[claim.label]
        )

    def _keep(self, label: WebLabel) -> None:
        self._labels[label.label] = label
        if label.port:
            self._at_port[label.port] = label.label

    def _new_port(self) -> int:
        """A free port, or that of the label that has been without a Function for longest."""
        first = self._site.first_port
        if not first and (port := self._ports.open(0)) is not None:
            return port
        for port in range(first, min(first + MAX_PORTS, 65536)):
            if first and port not in self._at_port and self._ports.open(port) is not None:
                return port
        idle = [label for label in self._labels.values() if label.label not in self._claims and label.port]
        if not idle:
            raise ResourceExhausted(
                f"no port is free for another web function: {len(self._at_port)} have one. Stop an App that is not "
                "needed, or give `aeolian up` a --domain, with which web functions need no ports"
            )
        oldest = min(idle, key=lambda label: label.used_at)
        del self._labels[oldest.label]
        return oldest.port

    async def _listen_again(self) -> None:
        """After a start. A label whose port is taken by somebody else meanwhile gets another one."""
        moved, taken = [], []
        for label in self._labels.values():
            if label.port and self._ports.open(label.port) is not None:
                self._at_port[label.port] = label.label
            elif label.label in self._claims:
                taken.append(label)
        for label in taken:
            port = self._new_port()
            if label.port:
                log.warning(
                    "port %d of the web function %s is used by another program: it is at port %d from now on",
                    label.port,
                    label.label,
                    port,
                )
            moved.append(msgspec.structs.replace(label, port=port))
            self._keep(moved[-1])

        def store(connection) -> None:
            for label in moved:
                storage.put_label(connection, label)

        if moved:
            await self._database.write(store)

    async def _app_ended(self, app_id: str, who: str = "") -> None:
        """Its labels keep their ports, in case it comes back; nobody answers there meanwhile."""
        now, labels = self._clock.now(), []
        for label, claims in list(self._claims.items()):
            left = [claim for claim in claims if claim.app_id != app_id]
            if len(left) == len(claims):
                continue
            if left:
                self._claims[label] = left
            else:
                del self._claims[label]
            labels.append(msgspec.structs.replace(self._labels[label], used_at=now))
            self._labels[label] = labels[-1]
        if not labels:
            return

        def store(connection) -> None:
            storage.delete_claims_of(connection, [app_id])
            for label in labels:
                storage.put_label(connection, label)

        await self._database.write(store)


def _is_same(one: WebClaim, other: WebClaim) -> bool:
    return (one.function_id, one.method_name) == (other.function_id, other.method_name)


class Label(NamedTuple):
    label: str
    is_truncated: bool


def label_of(web: WebFunction, *, workspace: str, web_suffix: str, app_name: str, is_deployed: bool) -> Label:
    """The label that follows from all these names."""
    owner = "-".join(filter(None, (_cleaned(workspace), _cleaned(web_suffix))))
    names: Iterable[str] = (web.requested_suffix,) if web.requested_suffix else (app_name, web.function_name)
    parts = [cleaned for name in names if (cleaned := _cleaned(name))]
    if not is_deployed:
        parts.append(_cleaned(web.ephemeral_suffix) or DEFAULT_DEV_SUFFIX)
    label = f"{owner}--{'-'.join(parts)}"
    if len(label) <= MAX_LABEL_LENGTH:
        return Label(label, False)
    digest = hashlib.sha256(label.encode()).hexdigest()[:HASH_LENGTH]
    return Label(f"{label[: MAX_LABEL_LENGTH - HASH_LENGTH - 1].rstrip('-')}-{digest}", True)


def _cleaned(name: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
