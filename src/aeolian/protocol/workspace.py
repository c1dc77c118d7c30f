"""RPCs about the caller itself: its token, its workspace, and the first hello."""

from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from modal_proto import api_pb2

from aeolian.control.apps import Apps
from aeolian.control.functions import Functions
from aeolian.control.tokens import Tokens
from aeolian.domain.caller import Caller
from aeolian.domain.errors import AeolianError, FailedPrecondition, PermissionDenied

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
            user_identity=api_pb2.UserIdentity(username=caller.workspace),
            created_at=Timestamp(seconds=int(token.created_at)),
            token_name=token.name,
        )
        if token.expires_at:
            response.expires_at.CopyFrom(Timestamp(seconds=int(token.expires_at)))
        return response

    async def TokensList(self, request: Empty, caller: Caller) -> api_pb2.TokensListResponse:
        _refuse_container(caller)
        response = api_pb2.TokensListResponse()
        for token in await self._tokens.all():
            if token.workspace != caller.workspace:
                continue
            item = response.tokens.add(
                token_id=token.token_id,
                created_at=token.created_at,
                workspace_id=token.workspace,
                last_used_at=token.last_used_at,
                name=token.name,
                disabled=token.is_disabled,
            )
            if token.expires_at:
                item.expires_at = token.expires_at
        return response

    async def TokenDisable(self, request: api_pb2.TokenDisableRequest, caller: Caller) -> Empty:
        _refuse_container(caller)
        if caller.token_id in request.token_ids:
            raise FailedPrecondition(
                f"{caller.token_id} is the token of this very request: use another one to disable it"
            )
        for token_id in request.token_ids:
            await self._tokens.set_disabled(token_id, True)
        return Empty()

    async def TokenEnable(self, request: api_pb2.TokenEnableRequest, caller: Caller) -> Empty:
        _refuse_container(caller)
        for token_id in request.token_ids:
            await self._tokens.set_disabled(token_id, False)
        return Empty()

    async def TokenDelete(self, request: api_pb2.TokenDeleteRequest, caller: Caller) -> Empty:
        _refuse_container(caller)
        if caller.token_id == request.token_id:
            raise FailedPrecondition(
                f"{caller.token_id} is the token of this very request: use another one to delete it"
            )
        await self._tokens.delete(request.token_id, once=caller.once("TokenDelete"))
        return Empty()

    async def ObjectSuggest(
        self, request: api_pb2.ObjectSuggestRequest, caller: Caller
    ) -> api_pb2.ObjectSuggestResponse:
        """Names that begin like a mistyped one."""
        response = api_pb2.ObjectSuggestResponse()
        limit = min(request.limit or MAX_SUGGESTIONS, MAX_SUGGESTIONS)
        try:
            environment = self._apps.environment(request.environment_name, caller)
        except AeolianError:
            return response
        app_part, _, object_part = request.query.lower().partition("/")
        for app in self._apps.living_apps():
            if app.environment_id != environment.id or app.workspace != caller.workspace or not app.name:
                continue
            if request.kind == api_pb2.ObjectSuggestRequest.OBJECT_SUGGEST_KIND_APP:
                names = [""] if app.name.lower().startswith(app_part) else []
            else:
                tags = self._functions.layout(app.app_id).functions
                names = [tag for tag in tags if app.name.lower() == app_part and tag.lower().startswith(object_part)]
            for name in names[: limit - len(response.suggestions)]:
                response.suggestions.add(app_name=app.name, object_name=name)
        return response


def _refuse_container(caller: Caller) -> None:
    if caller.is_container:
        raise PermissionDenied("a container has no token, and cannot look at those of others")
