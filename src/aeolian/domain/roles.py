"""Who may do what: roles in environments, the rights that they give, and the right that each RPC needs.

::

    NO_ACCESS < VIEWER (reads) < CONTRIBUTOR (changes, deploys, calls) < MANAGER (of the environment itself)

A token without any role setting manages everything. One with role settings has those, and no access elsewhere.
"""

from enum import IntEnum

import msgspec

from aeolian.domain.errors import InvalidArgument


class Role(IntEnum):
    """What somebody is in an environment. Each includes those before it."""

    NO_ACCESS = 0
    VIEWER = 1
    CONTRIBUTOR = 2
    MANAGER = 3

    @property
    def label(self) -> str:
        """As commands write it."""
        return self.name.lower().replace("_", "-")


class Right(IntEnum):
    """What an RPC needs of its caller."""

    ANY = 0
    """To be known; the handler shows each caller its own."""
    READ = 1
    WRITE = 2
    MANAGE = 3
    """These three in the environments that the request names: the role of the same number."""
    WORKSPACE = 4
    """To manage everything."""
    CONTAINER = 5
    """To be a container, which acts for itself."""


class Rule(msgspec.Struct, frozen=True):
    """What one RPC needs, and how its request says where."""

    right: Right
    anywhere: bool = False
    """It names no environment: the right in any one is enough."""
    environments: tuple[str, ...] = ("environment_name",)
    """Fields with the names of environments; "" is the default one. All ids in the request count as well."""
    ids_decide: bool = False
    """An environment that is left empty means nothing where the request has an id."""
    image_names: tuple[str, ...] = ()
    """Fields with names of images, `[environment/]name[:tag]`."""
    writes_if: str = "object_creation_type"
    """A field that makes it need WRITE when it is set, and READ when it is not."""
    for_restricted: bool = False
    """Containers that are shut off from everything else (`restrict_modal_access`) need it for their own work."""


def is_audited(name: str) -> bool:
    """Whether the trail tells of each such request that changes something. What calls and data are made of is left out."""
    changes = RULES[name].right in (Right.WRITE, Right.MANAGE, Right.WORKSPACE) or name == "TokenDelete"
    return changes and name not in _NOT_AUDITED


def role_named(text: str) -> Role:
    """By what people write. Raises InvalidArgument."""
    for role in Role:
        if text.strip().lower().replace("_", "-") == role.label:
            return role
    known = ", ".join(role.label for role in reversed(Role))
    raise InvalidArgument(f"{text!r} is no role: use one of {known}")


def _table() -> dict[str, Rule]:
    groups = (
        (Rule(Right.ANY), _ANY),
        (Rule(Right.READ), _READ),
        (Rule(Right.READ, anywhere=True), _READ_ANYWHERE),
        (Rule(Right.WRITE), _WRITE),
        (Rule(Right.WRITE, anywhere=True), _WRITE_ANYWHERE),
        (Rule(Right.MANAGE), _MANAGE),
        (Rule(Right.WORKSPACE), _WORKSPACE),
        (Rule(Right.CONTAINER), _CONTAINER),
    )
    table: dict[str, Rule] = {}
    for rule, names in groups:
        for name in names.split():
            assert name not in table, f"{name} has two rules"
            table[name] = rule
    for name, changes in _PARTICULARS.items():
        table[name] = msgspec.structs.replace(table[name], **changes)
    for name in _FOR_RESTRICTED.split():
        table[name] = msgspec.structs.replace(table[name], for_restricted=True)
    return table


_ANY = """
AuthTokenGet CliCommandSuggest ClientHello EndpointGetLibrary EnvironmentList TemplateList TokenDelete
TokenFlowCreate TokenFlowWait TokenInfoGet TokensList WorkspaceNameLookup WorkspaceSettings
"""

_READ = """
AppCountLogs AppDeploymentHistory AppFetchLogs AppGetByDeploymentName AppGetInfo AppGetLayout AppGetLifecycle
AppGetLogs AppGetObjects AppGetTags AppGetTimeRangeStats AppList AppLookup
ClassGet ClusterGet ClusterList
DictContains DictContents DictGet DictGetById DictHeartbeat DictLen DictList
EndpointGetByName EndpointGetInfo EndpointGetLifecycle EndpointList
EnvironmentBillingSummary EnvironmentGetBudget EnvironmentGetManaged EnvironmentGetOrCreate EnvironmentGetRoles
FlashContainerList
FunctionCallCount FunctionCallFetch FunctionCallFromId FunctionCallGetDataIn FunctionCallGetDataOut
FunctionCallGetInfo FunctionCallList FunctionGet FunctionGetById FunctionGetCallGraph FunctionGetCurrentStats
FunctionGetMetrics FunctionGetOutputs FunctionGetSchedulingParams FunctionGetSerialized FunctionGetTimeRangeStats
FunctionListVariants
ImageGetByTag ImageListTags ImageTagRevisions
ObjectSuggest PersistentSandboxGet PersistentSandboxTunnelsList ProxyGet
QueueGetById QueueHeartbeat QueueLen QueueList QueueNextItems
SandboxGetExitSnapshot SandboxGetExitSnapshotV2 SandboxGetFromName SandboxGetFromNameV2 SandboxGetLogs
SandboxGetResourceUsage SandboxGetStats SandboxGetStatsV2 SandboxGetTaskId SandboxGetTaskIdV2
SandboxGetTimeRangeStats SandboxGetTunnels SandboxGetTunnelsV2 SandboxList SandboxListV2 SandboxSnapshotGet
SandboxSnapshotWait SandboxTagsGet SandboxTagsGetV2 SandboxWait SandboxWaitUntilReady SandboxWaitV2
SecretGetInfo SecretList
ServerCountRequests ServerGetMetrics ServerGetTimeRangeStats ServerRequestFetch
SharedVolumeGetFile SharedVolumeHeartbeat SharedVolumeList SharedVolumeListFiles SharedVolumeListFilesStream
TaskGetInfo TaskList
VolumeGetById VolumeGetFile VolumeGetFile2 VolumeHeartbeat VolumeList VolumeListFiles VolumeListFiles2 VolumeReload
WebhookTokenListForEnvironment WorkspaceDashboardUrlGet
"""

_READ_ANYWHERE = """
BlobGet ImageBuildChainGet ImageFromId ImageJoinStreaming MetricsGetInfo ProxyList SandboxSnapshotFsAsyncGet
"""
"""Blobs and images belong to no environment: nobody can guess their ids."""

_WRITE = """
AppClientDisconnect AppCreate AppDeploy AppGetOrCreate AppHeartbeat AppPromote AppPublish AppRollback AppRollover
AppSetObjects AppSetTags AppStop AttemptStart AttemptRetry
ClassCreate ContainerExec ContainerReloadVolumes ContainerStop ContainerFilesystemExec
DictClear DictDelete DictGetOrCreate DictPop DictUpdate
EndpointCreate EndpointStop
FlashSetTargetSlotsMetrics
FunctionAsyncInvoke FunctionBindParams FunctionBlobGet FunctionCallCancel FunctionCreate FunctionFinishInputs
FunctionGetFlashAuthToken FunctionMap FunctionPrecreate FunctionPutInputs FunctionRetryInputs
FunctionUpdateSchedulingParams
ImageGetOrCreate ImageNameDelete ImagePublish
MapAwait MapStartOrContinue MountGetOrCreate
PersistentSandboxCreate PersistentSandboxResume PersistentSandboxTerminate
ProxyCreate ProxyDelete ProxyGetOrCreate
QueueClear QueueDelete QueueGet QueueGetOrCreate QueuePut
SandboxContainerCreateV2 SandboxCreate SandboxCreateConnectToken SandboxCreateConnectTokenV2 SandboxCreateV2
SandboxGetCommandRouterAccess SandboxRestore SandboxRestoreV2 SandboxSetName SandboxSetOutboundPolicy
SandboxSetOutboundPolicyV2 SandboxSnapshot SandboxSnapshotFs SandboxSnapshotFsAsync SandboxStdinWrite
SandboxTagsSet SandboxTagsSetV2 SandboxTerminate SandboxTerminateV2
SecretDelete SecretGetOrCreate SecretUpdate
SharedVolumeDelete SharedVolumeGetOrCreate SharedVolumePutFile SharedVolumeRemoveFile
TaskGetCommandRouterAccess
VolumeCommit VolumeCopyFiles VolumeCopyFiles2 VolumeDelete VolumeGetOrCreate VolumePutFiles VolumePutFiles2
VolumeRemoveFile VolumeRemoveFile2 VolumeRename
"""

_WRITE_ANYWHERE = """
AttemptAwait BlobCreate ContainerExecGetOutput ContainerExecPutInput ContainerExecWait CurlGetAuthToken MapCheckInputs
MountBatchedCheckExistence MountPutFile
"""

_MANAGE = """
EnvironmentDelete EnvironmentRoleSet EnvironmentSetBudget EnvironmentSetDefaultMemberRole EnvironmentSetManaged
EnvironmentUpdate UserGroupEnvironmentSet
"""

_WORKSPACE = """
AuditLogCount AuditLogList AuditLogPlan AuditLogSettingsGet ClusterReservationList
DomainCertificateVerify DomainCreate DomainList EnvironmentCreate ImageDelete ProxyAddIp ProxyRemoveIp
ServiceUserCreate ServiceUserDelete ServiceUserInfo ServiceUserList TokenDisable TokenEnable
WebhookTokenCreate WebhookTokenDelete WebhookTokenEnvironmentAdd WebhookTokenEnvironmentList
WebhookTokenEnvironmentRemove WebhookTokenList WebhookTokenUpdate
WorkspaceBillingRates WorkspaceBillingReport WorkspaceBillingSummary WorkspaceMembersList
WorkspaceSetDefaultEnvironment WorkspaceSetDefaultEnvironmentSettings WorkspaceSetImageBuilderVersion
"""

_CONTAINER = """
ContainerCheckpoint ContainerHeartbeat ContainerHello ContainerLog ContainerServerLifecycleReady
FlashContainerDeregister FlashContainerRegister FunctionCallPutDataOut FunctionGetDynamicConcurrency
FunctionGetInputs FunctionPutOutputs FunctionStartPtyShell TaskClusterHello TaskCurrentInputs TaskResult TunnelStart
TunnelStop
"""

_FOR_RESTRICTED = """
BlobCreate BlobGet ClientHello ContainerCheckpoint ContainerHeartbeat ContainerHello ContainerLog
ContainerServerLifecycleReady FlashContainerDeregister FlashContainerRegister FunctionCallGetDataIn
FunctionCallPutDataOut FunctionGetDynamicConcurrency FunctionGetInputs FunctionPutOutputs TaskClusterHello
TaskCurrentInputs TaskResult VolumeCommit VolumeReload
"""

_PARTICULARS: dict[str, dict] = {
    "EnvironmentGetOrCreate": {"environments": ("deployment_name",), "writes_if": ""},
    "EnvironmentUpdate": {"environments": ("current_name",)},
    "EnvironmentDelete": {"environments": ("name",)},
    "EnvironmentRoleSet": {"ids_decide": True},
    "FunctionGetOutputs": {"writes_if": "clear_on_success"},
    "FunctionBindParams": {"ids_decide": True},
    "MountGetOrCreate": {"ids_decide": True},
    "SandboxCreate": {"ids_decide": True},
    "SandboxList": {"ids_decide": True},
    "SandboxListV2": {"ids_decide": True},
    "SandboxTagsSet": {"ids_decide": True},
    "SandboxTagsSetV2": {"ids_decide": True},
    "TaskList": {"ids_decide": True},
    "VolumeDelete": {"ids_decide": True},
    "ImagePublish": {"image_names": ("tag",), "environments": ()},
    "ImageGetByTag": {"image_names": ("tag",), "environments": ()},
    "ImageTagRevisions": {"image_names": ("tag",), "environments": ()},
    "ImageNameDelete": {"image_names": ("tag",)},
}

_NOT_AUDITED = frozenset(
    [
        "AppClientDisconnect",
        "AppHeartbeat",
        "AttemptAwait",
        "AttemptRetry",
        "AttemptStart",
        "AuditLogCount",
        "AuditLogList",
        "AuditLogPlan",
        "AuditLogSettingsGet",
        "BlobCreate",
        "ContainerExecGetOutput",
        "ContainerExecPutInput",
        "ContainerExecWait",
        "ContainerFilesystemExec",
        "DictPop",
        "DictUpdate",
        "FlashSetTargetSlotsMetrics",
        "FunctionAsyncInvoke",
        "FunctionBindParams",
        "FunctionBlobGet",
        "FunctionFinishInputs",
        "FunctionMap",
        "FunctionPrecreate",
        "FunctionPutInputs",
        "FunctionRetryInputs",
        "ImageGetOrCreate",
        "MapAwait",
        "MapCheckInputs",
        "MapStartOrContinue",
        "MountBatchedCheckExistence",
        "MountGetOrCreate",
        "MountPutFile",
        "QueueGet",
        "QueuePut",
        "SandboxStdinWrite",
        "ServiceUserInfo",
        "ServiceUserList",
        "VolumeCommit",
        "WebhookTokenEnvironmentList",
        "WebhookTokenList",
        "WorkspaceBillingRates",
        "WorkspaceBillingReport",
        "WorkspaceBillingSummary",
        "WorkspaceMembersList",
    ]
)

RULES: dict[str, Rule] = _table()
"""The rule of every RPC of the protocol, built or not. An RPC without one is refused."""
