"""Writes `docs/compatibility.md`: every RPC of the protocol, and whether Aeolian answers it.

`built` is what the resource modules of this room define, and what a worker answers for its containers; both are
found as the server finds them (`service.collect`), nobody writes them down. Only why something is planned or out of
scope is told here.

    python -m aeolian.protocol.compatibility docs/compatibility.md
"""

import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from typing import NamedTuple

from google.protobuf.descriptor import ServiceDescriptor
from modal_proto import api_pb2, task_command_router_pb2

import aeolian.protocol
from aeolian.protocol.command_router import CommandRouter
from aeolian.protocol.service import collect
from aeolian.worker.container import WorkerContainer
from aeolian.worker.container_inputs import ContainerInputs
from aeolian.worker.server_life import ServerLife
from aeolian.worker.volume_rpcs import WorkerVolumeRpcs

SERVICES: tuple[ServiceDescriptor, ...] = (
    api_pb2.DESCRIPTOR.services_by_name["ModalClient"],
    task_command_router_pb2.DESCRIPTOR.services_by_name["TaskCommandRouter"],
)
WORKER_ANSWERS = (ContainerInputs, ServerLife, WorkerContainer, WorkerVolumeRpcs)
"""Classes whose methods a worker answers RPCs of its containers with (`worker/container.py`)."""

NEVER_CALLED = "no released SDK calls it"
ACCOUNT = "part of the hosted service's business, which a self-hosted cloud has no counterpart for"
INPUT_PLANE = "clients call it only when told the address of an input plane, and Aeolian has none"
OLD = "only SDKs before 1.5 called it, for a command that needs the hosted service"

OUT_OF_SCOPE: dict[str, tuple[str, ...]] = {
    NEVER_CALLED: (
        *("AppDeploy", "AppGetObjects", "AppSetObjects"),
        *("ContainerExec", "ContainerExecGetOutput", "ContainerExecWait", "ContainerLog"),
        *("DomainCertificateVerify", "DomainCreate", "DomainList"),
        *("EnvironmentGetBudget", "EnvironmentSetBudget", "EnvironmentSetDefaultMemberRole", "EnvironmentSetManaged"),
        *("FunctionAsyncInvoke", "FunctionBlobGet", "FunctionCallList", "FunctionGetSerialized"),
        *("ProxyAddIp", "ProxyCreate", "ProxyDelete", "ProxyGetOrCreate", "ProxyList", "ProxyRemoveIp"),
        *("SandboxGetResourceUsage", "SandboxGetStatsV2", "SandboxSetOutboundPolicy", "SandboxSetOutboundPolicyV2"),
        *("SandboxSnapshotFsAsync", "SandboxSnapshotFsAsyncGet", "SharedVolumeListFiles"),
        *("UserGroupEnvironmentSet", "VolumeGetFile"),
        "WorkspaceSetDefaultEnvironmentSettings",
    ),
    ACCOUNT: (
        *("AuditLogCount", "AuditLogList", "AuditLogPlan", "AuditLogSettingsGet", "ClusterReservationList"),
        *("EnvironmentBillingSummary", "WorkspaceBillingRates", "WorkspaceBillingSummary"),
    ),
    INPUT_PLANE: (
        *("AttemptAwait", "AttemptRetry", "AttemptStart", "MapAwait", "MapCheckInputs", "MapStartOrContinue"),
    ),
    OLD: ("EnvironmentGetManaged", "FlashSetTargetSlotsMetrics", "TemplateList"),
}

PLANNED_WITH: tuple[tuple[str, str], ...] = (
    (r"Sandbox|PersistentSandbox|ContainerFilesystem|ContainerReloadVolumes", "sandboxes"),
    (r"ContainerCheckpoint", "memory snapshots"),
    (r"Endpoint|Flash|Server|ContainerServer|FunctionGetFlash|CurlGetAuthToken", "endpoints and servers"),
    (r"Cluster|TaskCluster", "clustered functions"),
    (r"SharedVolume", "network file systems, which Modal itself has replaced by Volumes"),
    (r"Metrics|.*GetMetrics|.*TimeRangeStats", "metrics"),
    (r"WorkspaceBilling", "usage reports"),
    (r"ServiceUser|Workspace|Token|WebhookToken|Environment.*Role", "accounts and tokens for teams"),
    (r"Proxy", "proxies with a fixed address"),
    (r"Tunnel", "tunnels"),
    (r"Image", "images"),
    (r"ContainerExecPutInput|FunctionStartPtyShell", "interactive shells"),
    (r"CliCommandSuggest", "suggestions for mistyped commands"),
)
"""Patterns of RPC names, first match, and the feature that they come with."""


class Entry(NamedTuple):
    """One RPC in the list."""

    name: str
    status: str
    """`built`, `planned` or `out of scope`."""
    note: str


def entries(service: ServiceDescriptor, built: set[str]) -> list[Entry]:
    """All RPCs of a service, by name."""
    reasons = {name: reason for reason, names in OUT_OF_SCOPE.items() for name in names}
    return [_entry(method.name, service, built, reasons) for method in sorted(service.methods, key=lambda m: m.name)]


def _entry(name: str, service: ServiceDescriptor, built: set[str], reasons: dict[str, str]) -> Entry:
    if name in built:
        return Entry(name, "built", "")
    if service is SERVICES[0] and name in reasons:
        return Entry(name, "out of scope", reasons[name])
    if service is SERVICES[1]:
        return Entry(name, "planned", "sandboxes")
    return Entry(name, "planned", next((what for pattern, what in PLANNED_WITH if re.match(pattern, name)), ""))


def built_rpcs() -> set[str]:
    """The RPCs that the server's resource modules define, and those that workers answer themselves."""
    found: set[str] = set()
    for info in pkgutil.iter_modules(aeolian.protocol.__path__):
        module = importlib.import_module(f"aeolian.protocol.{info.name}")
        for name, resource in inspect.getmembers(module, inspect.isclass):
            if name.endswith("Rpcs") and resource.__module__ == module.__name__:
                found.update(collect([resource]))
    for resource in WORKER_ANSWERS:
        found.update(collect([resource]))
    found.update(method.name for method in SERVICES[1].methods if hasattr(CommandRouter, method.name))
    return found


def page() -> str:
    """The whole page as Markdown."""
    built = built_rpcs()
    lines = [
        "# Compatibility",
        "",
        "<!-- Generated by `make docs` from the code. Do not edit. -->",
        "",
        "What Aeolian does with each RPC of the protocol of `modal` "
        f"{importlib.metadata.version('modal')}. An RPC that is not built answers `UNIMPLEMENTED` and names itself.",
        "",
    ]
    for service in SERVICES:
        rows = entries(service, built)
        lines += [f"## {service.name}", "", _summary(rows), "", "| RPC | status | note |", "|---|---|---|"]
        lines += [f"| {row.name} | {row.status} | {row.note} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _summary(rows: list[Entry]) -> str:
    counts = {status: sum(row.status == status for row in rows) for status in ("built", "planned", "out of scope")}
    return f"{len(rows)} RPCs: " + ", ".join(f"{count} {status}" for status, count in counts.items()) + "."


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
