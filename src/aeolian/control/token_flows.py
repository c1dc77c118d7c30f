"""Tokens that are asked for by `modal token new`: whoever holds a token approves, and hands on what that may do.

::

    asked for (a code is shown to whoever asks) --approved with a token and that code--> a new token, given out once
"""

import asyncio
import contextlib
import hmac
import secrets

from aeolian.control.tokens import Tokens
from aeolian.domain.caller import Caller
from aeolian.domain.clock import Clock
from aeolian.domain.errors import NotFound, PermissionDenied, ResourceExhausted, Unauthenticated
from aeolian.domain.ids import BASE32, new_id

LIFETIME_S = 600.0
MAX_OPEN = 100
"""Anybody may ask, so it is bounded how many do at a time."""
MAX_ATTEMPTS = 5
MAX_WAIT_S = 55.0
CODE_LENGTH = 8
REMEDY = "run `modal token new` again"


class Flow:
    def __init__(self, flow_id: str, expires_at: float, lifetime_s: float):
        self.flow_id = flow_id
        self.wait_secret = secrets.token_urlsafe(32)
        self.code = "".join(secrets.choice(BASE32) for _ in range(CODE_LENGTH))
        self.expires_at = expires_at
        """On the clock's monotonic time."""
        self.lifetime_s = lifetime_s
        """Of the token that is asked for; 0: as long as the one that approves."""
        self.num_attempts = 0
        self.token: tuple[str, str] | None = None
        self.workspace = ""
        self.approved = asyncio.Event()


class TokenFlows:
    def __init__(self, tokens: Tokens, clock: Clock):
        self._tokens = tokens
        self._clock = clock
        self._open: dict[str, Flow] = {}

    def ask(self, lifetime_s: float) -> Flow:
        """Raises ResourceExhausted while too many others ask."""
        now = self._clock.monotonic()
        for flow in [flow for flow in self._open.values() if flow.expires_at <= now]:
            del self._open[flow.flow_id]
        if len(self._open) >= MAX_OPEN:
            raise ResourceExhausted(
                f"{MAX_OPEN} tokens are being asked for: try again in {LIFETIME_S / 60:.0f} minutes, or have one made "
                "with `aeolian token create`"
            )
        flow = Flow(new_id("token_flow"), now + LIFETIME_S, lifetime_s)
        self._open[flow.flow_id] = flow
        return flow

    def find(self, flow_id: str) -> Flow:
        """Raises NotFound for one that is over."""
        flow = self._open.get(flow_id)
        if flow is None or flow.expires_at <= self._clock.monotonic():
            raise NotFound(f"nobody asks for a token here any more: {REMEDY}")
        return flow

    async def approve(self, flow_id: str, code: str, token_id: str, secret: str) -> Caller:
        """With a token that may do at least as much as the new one, and the code. Returns who has approved.

        Raises NotFound, PermissionDenied for a wrong code, Unauthenticated for a wrong token.
        """
        flow = self.find(flow_id)
        if flow.token is not None:
            raise NotFound("this has been approved already")
        flow.num_attempts += 1
        if flow.num_attempts > MAX_ATTEMPTS:
            del self._open[flow_id]
            raise PermissionDenied(f"that was wrong too often: {REMEDY}")
        if not hmac.compare_digest(normalized(code), flow.code):
            raise PermissionDenied("this is not the code that the terminal shows")
        try:
            caller = await self._tokens.authenticate({"x-modal-token-id": token_id, "x-modal-token-secret": secret})
        except Unauthenticated as error:
            raise PermissionDenied(error.message) from error
        approving = await self._tokens.get(caller.token_id)
        if flow.token is not None:
            raise NotFound("this has been approved already")
        wanted_end = self._clock.now() + flow.lifetime_s if flow.lifetime_s else 0.0
        flow.token = ("", "")  # nobody else may approve meanwhile
        try:
            flow.token = await self._tokens.create(
                caller.name,
                caller.workspace,
                expires_at=min(filter(None, (approving.expires_at, wanted_end)), default=0.0),
                roles=caller.roles,
                created_by=caller.name,
            )
        except BaseException:
            flow.token = None
            raise
        flow.workspace = caller.workspace
        flow.approved.set()
        return caller

    async def wait(self, flow_id: str, wait_secret: str, timeout_s: float) -> Flow | None:
        """Until it is approved; None when that takes longer. Only for whoever asked. Raises NotFound."""
        flow = self.find(flow_id)
        if not hmac.compare_digest(wait_secret.encode(), flow.wait_secret.encode()):
            raise NotFound(f"nobody asks for a token here any more: {REMEDY}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(timeout_s, MAX_WAIT_S))):
                await flow.approved.wait()
        return flow if flow.approved.is_set() else None


def normalized(code: str) -> str:
    """As it was given out, however it was typed."""
    return "".join(letter for letter in code.upper() if letter in BASE32)
