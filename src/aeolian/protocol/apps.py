"""RPCs of Apps: their life, their deployments, and what is shown of them."""

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.deployments import Deployments, Publication
from aeolian.control.functions import Functions
from aeolian.domain.apps import App, AppState, AppVersion, DeploymentType
from aeolian.domain.caller import Caller
from aeolian.domain.errors import InvalidArgument

STATES = {
    AppState.INITIALIZING: api_pb2.APP_STATE_INITIALIZING,
    AppState.EPHEMERAL: api_pb2.APP_STATE_EPHEMERAL,
    AppState.DETACHED: api_pb2.APP_STATE_DETACHED,
    AppState.DETACHED_DISCONNECTED: api_pb2.APP_STATE_DETACHED_DISCONNECTED,
    AppState.DEPLOYED: api_pb2.APP_STATE_DEPLOYED,
    AppState.STOPPING: api_pb2.APP_STATE_STOPPING,
    AppState.STOPPED: api_pb2.APP_STATE_STOPPED,
}
CREATED_AS = {
    api_pb2.APP_STATE_UNSPECIFIED: AppState.EPHEMERAL,
    api_pb2.APP_STATE_EPHEMERAL: AppState.EPHEMERAL,
    api_pb2.APP_STATE_DETACHED: AppState.DETACHED,
    api_pb2.APP_STATE_INITIALIZING: AppState.INITIALIZING,
}
PUBLISHED_AS = {
    api_pb2.APP_STATE_UNSPECIFIED: None,
    api_pb2.APP_STATE_EPHEMERAL: AppState.EPHEMERAL,
    api_pb2.APP_STATE_DETACHED: AppState.DETACHED,
    api_pb2.APP_STATE_DEPLOYED: AppState.DEPLOYED,
}
DEPLOYMENT_TYPES = {
    DeploymentType.STANDARD: api_pb2.DEPLOYMENT_TYPE_STANDARD,
    DeploymentType.ROLLBACK: api_pb2.DEPLOYMENT_TYPE_ROLLBACK,
    DeploymentType.ROLLOVER: api_pb2.DEPLOYMENT_TYPE_ROLLOVER,
    DeploymentType.PROMOTION: api_pb2.DEPLOYMENT_TYPE_PROMOTION,
    DeploymentType.STAGED: api_pb2.DEPLOYMENT_TYPE_STAGED,
}


class AppRpcs:
    def __init__(self, apps: Apps, deployments: Deployments, functions: Functions, public_http_url: str):
        self._apps = apps
        self._deployments = deployments
        self._functions = functions
        self._public_http_url = public_http_url.rstrip("/")

    # ---- life -------------------------------------------------------------------------------------------

    async def AppCreate(self, request: api_pb2.AppCreateRequest, caller: Caller) -> api_pb2.AppCreateResponse:
        state = CREATED_AS.get(request.app_state)
        if state is None:
            raise InvalidArgument(f"an App cannot be created in the state {request.app_state}")
        app = await self._apps.create(caller, state, request.description, request.environment_name, dict(request.tags))
        url = self._page_url(app.app_id)
        return api_pb2.AppCreateResponse(app_id=app.app_id, app_page_url=url, app_logs_url=f"{url}/logs")

    async def AppGetOrCreate(
        self, request: api_pb2.AppGetOrCreateRequest, caller: Caller
    ) -> api_pb2.AppGetOrCreateResponse:
        creation = request.object_creation_type
        if creation not in (
            api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED,
            api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING,
            api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS,
        ):
            raise InvalidArgument(f"an App cannot be created in the manner {creation}")
        app = await self._apps.get_or_create(
            caller,
            request.app_name,
            request.environment_name,
            create=creation != api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED,
            must_be_new=creation == api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS,
        )
        return api_pb2.AppGetOrCreateResponse(app_id=app.app_id, handle_metadata=self._metadata(app))

    async def AppHeartbeat(self, request: api_pb2.AppHeartbeatRequest, caller: Caller) -> Empty:
        await self._apps.heartbeat(request.app_id, caller)
        return Empty()

    async def AppClientDisconnect(self, request: api_pb2.AppClientDisconnectRequest, caller: Caller) -> Empty:
        failed = request.reason == api_pb2.APP_DISCONNECT_REASON_DEPLOYMENT_EXCEPTION
        await self._apps.client_disconnected(request.app_id, caller, deployment_failed=failed)
        return Empty()

    async def AppStop(self, request: api_pb2.AppStopRequest, caller: Caller) -> Empty:
        await self._apps.stop(request.app_id, caller, by=caller.who)
        return Empty()

    async def AppSetTags(self, request: api_pb2.AppSetTagsRequest, caller: Caller) -> Empty:
        await self._apps.set_tags(request.app_id, dict(request.tags), caller)
        return Empty()

    # ---- deployments ------------------------------------------------------------------------------------

    async def AppPublish(self, request: api_pb2.AppPublishRequest, caller: Caller) -> api_pb2.AppPublishResponse:
        if request.app_state not in PUBLISHED_AS:
            raise InvalidArgument(f"an App cannot be published in the state {request.app_state}")
        asked = Publication(
            app_id=request.app_id,
            state=PUBLISHED_AS[request.app_state],
            name=request.name,
            function_ids=dict(request.function_ids),
            class_ids=dict(request.class_ids),
            definition_ids=dict(request.definition_ids),
            tags=dict(request.tags),
            deployment_tag=request.deployment_tag,
            commit_info=request.commit_info.SerializeToString(),
            client_version=request.client_version,
            staged=request.staged,
        )
        deployed_at = await self._deployments.publish(asked, caller)
        warnings = [
            api_pb2.Warning(type=api_pb2.Warning.WARNING_TYPE_FUNCTION_CONFIGURATION, message=sentence)
            for function_id in sorted(request.function_ids.values())
            for sentence in self._functions.unbuilt(function_id)
        ]
        url = self._page_url(request.app_id)
        return api_pb2.AppPublishResponse(url=url, deployed_at=deployed_at, server_warnings=warnings)

    async def AppRollback(self, request: api_pb2.AppRollbackRequest, caller: Caller) -> api_pb2.AppRollbackResponse:
        deployed_at = await self._deployments.roll_back(request.app_id, request.version, caller)
        return api_pb2.AppRollbackResponse(url=self._page_url(request.app_id), deployed_at=deployed_at)

    async def AppRollover(self, request: api_pb2.AppRolloverRequest, caller: Caller) -> api_pb2.AppRolloverResponse:
        deployed_at = await self._deployments.roll_over(request.app_id, caller)
        return api_pb2.AppRolloverResponse(url=self._page_url(request.app_id), deployed_at=deployed_at)

    async def AppPromote(self, request: api_pb2.AppPromoteRequest, caller: Caller) -> api_pb2.AppPromoteResponse:
        deployed_at = await self._deployments.promote(request.app_id, request.version, caller)
        return api_pb2.AppPromoteResponse(url=self._page_url(request.app_id), deployed_at=deployed_at)

    async def AppDeploymentHistory(
        self, request: api_pb2.AppDeploymentHistoryRequest, caller: Caller
    ) -> api_pb2.AppDeploymentHistoryResponse:
        app = await self._apps.find(request.app_id, caller)
        history = await self._deployments.history(request.app_id, caller)
        return api_pb2.AppDeploymentHistoryResponse(
            app_deployment_histories=[_history_entry(entry, app) for entry in history],
            production_app_version=app.version,
        )

    # ---- looking ----------------------------------------------------------------------------------------

    async def AppGetByDeploymentName(
        self, request: api_pb2.AppGetByDeploymentNameRequest, caller: Caller
    ) -> api_pb2.AppGetByDeploymentNameResponse:
        found = await self._apps.look_up_name(request.name, request.environment_name, caller)
        app = found.deployed or found.previous
        return api_pb2.AppGetByDeploymentNameResponse(
            app_id=found.deployed.app_id if found.deployed else "",
            previous_app_id=found.previous.app_id if found.previous else "",
            environment_name=found.environment_name,
            lifecycle=lifecycle(app) if app else None,
        )

    async def AppLookup(self, request: api_pb2.AppLookupRequest, caller: Caller) -> api_pb2.AppLookupResponse:
        app = self._apps.deployed(request.app_name, request.environment_name, caller)
        return api_pb2.AppLookupResponse(app_id=app.app_id)

    async def AppGetLayout(self, request: api_pb2.AppGetLayoutRequest, caller: Caller) -> api_pb2.AppGetLayoutResponse:
        await self._apps.find_living(request.app_id, caller)
        return api_pb2.AppGetLayoutResponse(app_layout=self._functions.layout_message(request.app_id))

    async def AppGetLifecycle(
        self, request: api_pb2.AppGetLifecycleRequest, caller: Caller
    ) -> api_pb2.AppGetLifecycleResponse:
        return api_pb2.AppGetLifecycleResponse(lifecycle=lifecycle(await self._apps.find(request.app_id, caller)))

    async def AppGetInfo(self, request: api_pb2.AppGetInfoRequest, caller: Caller) -> api_pb2.AppGetInfoResponse:
        app = await self._apps.find(request.app_id, caller)
        response = api_pb2.AppGetInfoResponse(info=self._metadata(app))
        for function in self._functions.layout(app.app_id).functions.values():
            summary = response.function_info_summaries[function.function_id]
            data = self._functions.function_data(function.function_id)
            for ranked in data.ranked_functions:
                if ranked.function.resources.gpu_config.count:
                    summary.gpu_config.append(ranked.function.resources.gpu_config)
            if data.HasField("schedule"):
                summary.schedule.CopyFrom(data.schedule)
            webhooks = [data.webhook_config, *(method.webhook_config for method in data.method_definitions.values())]
            webhooks = [webhook for webhook in webhooks if webhook.type]
            if webhooks:
                summary.web_function = True
                summary.requires_proxy_auth = all(webhook.requires_proxy_auth for webhook in webhooks)
            elif data.is_server:
                summary.requires_proxy_auth = not data.http_config.unauthenticated
            summary.is_sessioned = data.is_sessioned
        return response

    async def AppList(self, request: api_pb2.AppListRequest, caller: Caller) -> api_pb2.AppListResponse:
        apps = await self._apps.list_in(request.environment_name, caller)
        return api_pb2.AppListResponse(
            apps=[
                api_pb2.AppListResponse.AppListItem(
                    app_id=app.app_id,
                    description=app.description,
                    state=STATES[app.state],
                    created_at=app.created_at,
                    stopped_at=app.stopped_at,
                    n_running_tasks=self._apps.fleet.num_containers(app.app_id),
                    name=app.name,
                    metadata=self._metadata(app),
                )
                for app in apps
            ]
        )

    async def AppGetTags(self, request: api_pb2.AppGetTagsRequest, caller: Caller) -> api_pb2.AppGetTagsResponse:
        return api_pb2.AppGetTagsResponse(tags=(await self._apps.find(request.app_id, caller)).tags)

    # ---- inside -----------------------------------------------------------------------------------------

    def _page_url(self, app_id: str) -> str:
        return f"{self._public_http_url}/apps/{app_id}"

    def _metadata(self, app: App) -> api_pb2.AppHandleMetadata:
        metadata = api_pb2.AppHandleMetadata(
            description=app.description,
            app_id=app.app_id,
            environment_name=app.environment_name,
            lifecycle=lifecycle(app),
        )
        for tag, function in self._functions.layout(app.app_id).functions.items():
            is_server = self._functions.pool_settings(function.function_id).is_server
            (metadata.servers if is_server else metadata.functions)[tag] = function.function_id
        return metadata


def lifecycle(app: App) -> api_pb2.AppLifecycle:
    return api_pb2.AppLifecycle(
        app_state=STATES[app.state],
        created_at=app.created_at,
        created_by=app.created_by,
        deployed_at=app.deployed_at,
        deployed_by=app.deployed_by,
        version=app.version if app.deployed_at else 0,
        stopped_at=app.stopped_at,
        stopped_by=app.stopped_by,
    )


def _history_entry(entry: AppVersion, app: App) -> api_pb2.AppDeploymentHistory:
    message = api_pb2.AppDeploymentHistory(
        app_id=entry.app_id,
        version=entry.version,
        client_version=entry.client_version,
        deployed_at=entry.deployed_at,
        deployed_by=entry.deployed_by,
        tag=entry.deployment_tag,
        rollback_version=entry.source_version if entry.deployment_type is DeploymentType.ROLLBACK else 0,
        rollback_allowed=entry.version != app.version
        and entry.deployment_type is not DeploymentType.STAGED
        and app.state is AppState.DEPLOYED,
        deployment_type=DEPLOYMENT_TYPES[entry.deployment_type],
    )
    if entry.commit_info:
        message.commit_info.ParseFromString(entry.commit_info)
    return message
