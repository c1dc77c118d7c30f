"""RPCs of `modal token new` and `modal setup`: whoever calls them has no token yet."""

from modal_proto import api_pb2

from aeolian.control.token_flows import TokenFlows
from aeolian.domain.caller import Caller

OPEN_METHODS = frozenset(["TokenFlowCreate", "TokenFlowWait"])
"""What may be called without a token."""


class TokenFlowRpcs:
    def __init__(self, flows: TokenFlows, public_http_url: str):
        self._flows = flows
        self._public_http_url = public_http_url.rstrip("/")

    async def TokenFlowCreate(
        self, request: api_pb2.TokenFlowCreateRequest, caller: Caller
    ) -> api_pb2.TokenFlowCreateResponse:
        flow = self._flows.ask(float(request.expires_in_seconds))
        return api_pb2.TokenFlowCreateResponse(
            token_flow_id=flow.flow_id,
            web_url=f"{self._public_http_url}/token-flow/{flow.flow_id}",
            code=flow.code,
            wait_secret=flow.wait_secret,
        )

    async def TokenFlowWait(
        self, request: api_pb2.TokenFlowWaitRequest, caller: Caller
    ) -> api_pb2.TokenFlowWaitResponse:
        flow = await self._flows.wait(request.token_flow_id, request.wait_secret, request.timeout)
        if flow is None or flow.token is None:
            return api_pb2.TokenFlowWaitResponse(timeout=True)
        token_id, secret = flow.token
        return api_pb2.TokenFlowWaitResponse(token_id=token_id, token_secret=secret, workspace_username=flow.workspace)
