"""RPCs of proxy tokens, which the protocol calls webhook tokens."""

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from aeolian.control.environments import Environments
from aeolian.control.proxy_tokens import ProxyTokens
from aeolian.domain.caller import Caller
from aeolian.domain.errors import PermissionDenied
from aeolian.storage.proxy_tokens import ProxyToken


class ProxyTokenRpcs:
    def __init__(self, tokens: ProxyTokens, environments: Environments):
        self._tokens = tokens
        self._environments = environments

    async def WebhookTokenCreate(
        self, request: api_pb2.WebhookTokenCreateRequest, caller: Caller
    ) -> api_pb2.TokenCreateResponse:
        _refuse_container(caller)
        once = caller.once("WebhookTokenCreate")
        token_id, secret = await self._tokens.create(caller, request.name, is_scoped=request.scoped, once=once)
        return api_pb2.TokenCreateResponse(token_id=token_id, token_secret=secret)

    async def WebhookTokenUpdate(
        self, request: api_pb2.WebhookTokenUpdateRequest, caller: Caller
    ) -> api_pb2.WebhookToken:
        _refuse_container(caller)
        if not request.HasField("name"):
            return _message(self._tokens.get(request.token_id, caller))
        return _message(await self._tokens.rename(request.token_id, request.name, caller))

    async def WebhookTokenDelete(self, request: api_pb2.TokenDeleteRequest, caller: Caller) -> Empty:
        _refuse_container(caller)
        await self._tokens.delete(request.token_id, caller)
        return Empty()

    async def WebhookTokenList(self, request: Empty, caller: Caller) -> api_pb2.WebhookTokenListResponse:
        _refuse_container(caller)
        return api_pb2.WebhookTokenListResponse(tokens=map(_message, self._tokens.all(caller)))

    async def WebhookTokenListForEnvironment(
        self, request: api_pb2.WebhookTokenListForEnvironmentRequest, caller: Caller
    ) -> api_pb2.WebhookTokenListResponse:
        _refuse_container(caller)
        environment = self._environments.resolve(request.environment_name, caller)
        found = [token for token in self._tokens.all(caller) if token.is_for(environment.id)]
        return api_pb2.WebhookTokenListResponse(tokens=map(_message, found))

    async def WebhookTokenEnvironmentList(
        self, request: api_pb2.WebhookTokenEnvironmentListRequest, caller: Caller
    ) -> api_pb2.WebhookTokenEnvironmentListResponse:
        _refuse_container(caller)
        token = self._tokens.get(request.token_id, caller)
        return api_pb2.WebhookTokenEnvironmentListResponse(environment_ids=sorted(token.environment_ids))

    async def WebhookTokenEnvironmentAdd(
        self, request: api_pb2.WebhookTokenEnvironmentAddRequest, caller: Caller
    ) -> Empty:
        _refuse_container(caller)
        await self._tokens.allow(request.token_id, request.environment_id, caller)
        return Empty()

    async def WebhookTokenEnvironmentRemove(
        self, request: api_pb2.WebhookTokenEnvironmentRemoveRequest, caller: Caller
    ) -> Empty:
        _refuse_container(caller)
        await self._tokens.revoke(request.token_id, request.environment_id, caller)
        return Empty()


def _message(token: ProxyToken) -> api_pb2.WebhookToken:
    return api_pb2.WebhookToken(
        token_id=token.token_id,
        created_at=token.created_at,
        scoped=token.is_scoped,
        name=token.name,
        created_by=api_pb2.UserIdentity(user_id=token.created_by, username=token.created_by),
    )


def _refuse_container(caller: Caller) -> None:
    if caller.is_container:
        raise PermissionDenied("proxy tokens are made and listed by clients, not by containers")
