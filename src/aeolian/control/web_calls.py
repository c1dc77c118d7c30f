"""Web requests as function calls: one input each, which nothing stores, with a stream in and a stream out."""

import pickle
from typing import Any

from modal_proto import api_pb2

from aeolian.control.calls import Calls
from aeolian.control.web_exchange import Exchange
from aeolian.control.web_urls import WebTarget
from aeolian.domain.caller import Caller

PICKLE_PROTOCOL = 4
"""The SDK's, which every Python that runs it can read."""


class WebCalls:
    def __init__(self, calls: Calls):
        self._calls = calls

    async def begin(self, target: WebTarget, scope: dict[str, Any]) -> "WebCall":
        """Queue a request for the web function. Raises what `Calls.start` raises.

        Containers take the scope as an ordinary argument, whatever formats the Function names.
        """
        payload = api_pb2.FunctionInput(
            args=pickle.dumps(((scope,), {}), protocol=PICKLE_PROTOCOL),
            data_format=api_pb2.DATA_FORMAT_PICKLE,
            method_name=target.method_name,
        )
        exchange = Exchange()
        call_id = self._calls.start_unstored(
            target.function_id, Caller(workspace=target.workspace), payload.SerializeToString(), exchange
        )
        return WebCall(self._calls, call_id, exchange)


class WebCall:
    """One request. Whoever made it calls `leave` in the end."""

    def __init__(self, calls: Calls, call_id: str, exchange: Exchange):
        self._calls = calls
        self._call_id = call_id
        self.exchange = exchange

    def leave(self, message: api_pb2.Asgi) -> None:
        """The client has gone, or has its answer. What no container has begun will not be."""
        self.exchange.leave(message)
        self._calls.abandon_queued(self._call_id)
