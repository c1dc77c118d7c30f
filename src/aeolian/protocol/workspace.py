"""RPCs about the caller itself: its token, its workspace, and the first hello."""

from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.functions import Functions
from aeolian.control.tokens import Tokens
from aeolian.domain.caller import Caller
from aeolian.domain.errors import AeolianError, FailedPrecondition, PermissionDenied
from aeolian.domain.suggestions import nearest

DEFAULT_SUGGESTIONS = 3
MAX_SUGGESTIONS = 10


class WorkspaceRpcs:
    def __init__(self, tokens: Tokens, apps: Apps, functions: Functions):
        self._tokens = tokens
        self._apps = apps
        self._functions = functions

    async def ClientHello(self, request: Empty, caller: Caller) -> api_pb2.ClientHelloResponse:
        return api_pb2.ClientHelloResponse()

    async def AuthTokenGet(self, request: api_pb2.AuthTokenGetRequest, caller: Caller) -> api_pb2.AuthTokenGetResponse:
        return api_pb2.AuthTokenGetResponse(token=self._tokens.auth_token(caller))

    async def WorkspaceNameLookup(self, request: Empty, caller: Caller) -> api_pb2.WorkspaceNameLookupResponse:
        return api_pb2.WorkspaceNameLookupResponse(workspace_name=caller.workspace, username=caller.workspace)

    async def TokenInfoGet(self, request: api_pb2.TokenInfoGetRequest, caller: Caller) -> api_pb2.TokenInfoGetResponse:
        _refuse_container(caller)
        token = await self._tokens.get(caller.token_id)
        response = api_pb2.TokenInfoGetResponse(
            token_id=token.token_id,
            workspace_id=caller.workspace,
            workspace_name=caller.workspace,
            created_at=Timestamp(seconds=int(token.created_at)),
            token_name=token.name,
        )
        if token.service_user_id:
            response.service_user_identity.CopyFrom(
                api_pb2.ServiceUserIdentity(service_user_id=token.service_user_id, service_user_name=token.name)
            )
            if token.created_by:
                response.service_user_identity.created_by.CopyFrom(
                    api_pb2.UserIdentity(user_id=token.created_by, username=token.created_by)
                )
        else:
            response.user_identity.CopyFrom(api_pb2.UserIdentity(user_id=token.token_id, username=token.name))
        if token.expires_at:
            response.expires_at.CopyFrom(Timestamp(seconds=int(token.expires_at)))
        return response

    async def TokensList(self, request: Empty, caller: Caller) -> api_pb2.TokensListResponse:
        """All of people; whoever does not manage everything sees its own."""
        _refuse_container(caller)
        response = api_pb2.TokensListResponse()
        for token in await self._tokens.all():
            if token.workspace != caller.workspace or token.service_user_id:
                continue
            if caller.roles is not None and token.token_id != caller.token_id:
                continue
            item = response.tokens.add(
                token_id=token.token_id,
                created_at=token.created_at,
                workspace_id=token.workspace,
                user_id=token.token_id,
                member_displayname=token.name,
                last_used_at=token.last_used_at,
                name=token.name,
                disabled=token.is_disabled,
            )
            if token.expires_at:
                item.expires_at = token.expires_at
        return response

    async def TokenDisable(self, request: api_pb2.TokenDisableRequest, caller: Caller) -> Empty:
        if caller.token_id in request.token_ids:
            raise FailedPrecondition(
                f"{caller.token_id} is the token of this very request: use another one to disable it"
            )
        for token_id in request.token_ids:
            await self._tokens.set_disabled(token_id, True)
        return Empty()

    async def TokenEnable(self, request: api_pb2.TokenEnableRequest, caller: Caller) -> Empty:
        for token_id in request.token_ids:
            await self._tokens.set_disabled(token_id, False)
        return Empty()

    async def TokenDelete(self, request: api_pb2.TokenDeleteRequest, caller: Caller) -> Empty:
        """Its own (`modal token rotate` does so), or for whoever manages everything: any."""
        _refuse_container(caller)
        is_own = caller.token_id == request.token_id
        if caller.roles is not None and not is_own:
            raise PermissionDenied(f"your token '{caller.name}' has only roles: it can delete no other than itself")
        if is_own and caller.roles is None and await self._tokens.is_last(caller.token_id):
            raise FailedPrecondition(
                f"{caller.token_id} is the last token that manages everything: make another one before you delete it"
            )
        await self._tokens.delete(request.token_id, once=caller.once("TokenDelete"))
        return Empty()

    async def ObjectSuggest(
        self, request: api_pb2.ObjectSuggestRequest, caller: Caller
    ) -> api_pb2.ObjectSuggestResponse:
        """Names like a mistyped one: of deployed Apps, or of their Functions as `app/function`."""
        response = api_pb2.ObjectSuggestResponse()
        limit = min(request.limit or DEFAULT_SUGGESTIONS, MAX_SUGGESTIONS)
        try:
            environment = self._apps.environment(request.environment_name, caller)
        except AeolianError:
            return response
        apps = [
            app
            for app in self._apps.living_apps()
            if app.environment_id == environment.id and app.workspace == caller.workspace and app.name
        ]
        if request.kind == api_pb2.ObjectSuggestRequest.OBJECT_SUGGEST_KIND_APP:
            for name in nearest(request.query, [app.name for app in apps], limit):
                response.suggestions.add(object_name=name)
            return response
        wants_server = request.kind == api_pb2.ObjectSuggestRequest.OBJECT_SUGGEST_KIND_SERVER
        places = {
            f"{app.name}/{tag}": (app.name, tag)
            for app in apps
            for tag, function in self._functions.layout(app.app_id).functions.items()
            if self._functions.pool_settings(function.function_id).is_server == wants_server
        }
        for reference in nearest(request.query, places, limit):
            app_name, tag = places[reference]
            response.suggestions.add(app_name=app_name, object_name=tag)
        return response


def _refuse_container(caller: Caller) -> None:
    if caller.is_container:
        raise PermissionDenied("a container has no token, and cannot look at those of others")
