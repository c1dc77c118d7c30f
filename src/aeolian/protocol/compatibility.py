"""Writes `docs/compatibility.md`: every RPC of the protocol, and whether Aeolian answers it.

`built` is what the resource modules define, found as the server finds it (`service.collect`); nobody writes it down.
Only why something is planned or out of scope is told here.

    python -m aeolian.protocol.compatibility docs/compatibility.md
"""

import importlib
import importlib.metadata
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple

from google.protobuf.descriptor import ServiceDescriptor
from modal_proto import api_pb2, task_command_router_pb2

import aeolian
from aeolian.protocol.service import collect

SERVICES: tuple[ServiceDescriptor, ...] = (
    api_pb2.DESCRIPTOR.services_by_name["ModalClient"],
    task_command_router_pb2.DESCRIPTOR.services_by_name["TaskCommandRouter"],
)
SOURCES = Path(aeolian.__file__).parent
DEFINES_RPCS = re.compile(r"^class (\w+Rpcs)\b", re.MULTILINE)

NEVER_CALLED = "no released SDK calls it"
ACCOUNT = "part of the hosted service's business, which a self-hosted cloud has no counterpart for"
INPUT_PLANE = "clients call it only when told the address of an input plane, and Aeolian has none"
OLD = "only SDKs before 1.5 called it, for a command that needs the hosted service"

OUT_OF_SCOPE: dict[str, tuple[str, ...]] = {
    NEVER_CALLED: (
        *("AppDeploy", "AppGetObjects", "AppLookup", "AppSetObjects"),
        *("ContainerExec", "ContainerExecGetOutput", "ContainerExecWait", "ContainerLog"),
        *("DomainCertificateVerify", "DomainCreate", "DomainList"),
        *("EnvironmentGetBudget", "EnvironmentSetBudget", "EnvironmentSetDefaultMemberRole", "EnvironmentSetManaged"),
        *("FunctionAsyncInvoke", "FunctionBlobGet", "FunctionCallList", "FunctionGetSerialized"),
        *("ProxyAddIp", "ProxyCreate", "ProxyDelete", "ProxyGetOrCreate", "ProxyList", "ProxyRemoveIp"),
        *("SandboxGetResourceUsage", "SandboxGetStatsV2", "SandboxSetOutboundPolicy", "SandboxSetOutboundPolicyV2"),
        *("SandboxSnapshotFsAsync", "SandboxSnapshotFsAsyncGet", "SharedVolumeListFiles", "TaskCurrentInputs"),
        *("UserGroupEnvironmentSet", "VolumeGetFile", "WebhookTokenEnvironmentList"),
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
    (r"Sandbox|PersistentSandbox|TaskGetCommandRouterAccess|ContainerFilesystem|ContainerReloadVolumes", "sandboxes"),
    (r"ContainerCheckpoint", "memory snapshots"),
    (r"Endpoint|Flash|Server|ContainerServer|FunctionGetFlash|CurlGetAuthToken", "endpoints and servers"),
    (r"Cluster|TaskCluster", "clustered functions"),
    (r"SharedVolume", "network file systems, which Modal itself has replaced by Volumes"),
    (r"Metrics|.*GetMetrics|.*TimeRangeStats", "metrics"),
    (r"WorkspaceBilling", "usage reports"),
    (r"ServiceUser|Workspace|Token|WebhookToken|Environment.*Role", "accounts and tokens for teams"),
    (r"Proxy", "proxies with a fixed address"),
    (r"Tunnel", "tunnels"),
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
    """The RPCs that any resource module defines: the server's, and those that the worker answers for its containers."""
    found: set[str] = set()
    for path in sorted(SOURCES.rglob("*.py")):
        names = [name for name in DEFINES_RPCS.findall(path.read_text()) if path.name != "service.py"]
        if not names:
            continue
        module = importlib.import_module(".".join(("aeolian", *path.relative_to(SOURCES).with_suffix("").parts)))
        found.update(*(collect([getattr(module, name)]) for name in names if inspect.isclass(getattr(module, name))))
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
