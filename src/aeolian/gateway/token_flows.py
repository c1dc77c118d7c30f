"""The page that `modal token new` leads to: whoever has a token approves another one there.

Nothing is kept in the browser: a request that approves carries the code and a token, so that no other page can send it.
"""

import html

from aiohttp import web

from aeolian.control.audit import AuditTrail
from aeolian.control.token_flows import TokenFlows
from aeolian.domain.errors import AeolianError, InvalidArgument, PayloadTooLarge

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
MAX_FORM_BYTES = 4096


class TokenFlowPages:
    def __init__(self, flows: TokenFlows, trail: AuditTrail):
        self._flows = flows
        self._trail = trail

    def routes(self) -> list[web.RouteDef]:
        path = "/token-flow/{flow_id}"
        return [web.get(path, self.show), web.post(path, self.approve)]

    async def show(self, request: web.Request) -> web.Response:
        self._flows.find(request.match_info["flow_id"])
        return _answer(FORM.format(problem=""))

    async def approve(self, request: web.Request) -> web.Response:
        if request.content_length is None or request.content_length > MAX_FORM_BYTES:
            raise PayloadTooLarge(f"a form of up to {MAX_FORM_BYTES} bytes is expected, with its Content-Length")
        try:
            form = await request.post()
        except (ValueError, LookupError) as error:  # of its encoding
            raise InvalidArgument("this is not the form of this page") from error
        code, token_id, secret = (str(form.get(name, "")).strip() for name in ("code", "token_id", "token_secret"))
        flow_id = request.match_info["flow_id"]
        try:
            caller = await self._flows.approve(flow_id, code, token_id, secret)
        except AeolianError as error:
            return _answer(FORM.format(problem=f'<p role="alert">{html.escape(error.message)}</p>'), status=403)
        await self._trail.record(caller, "token flow", "", [flow_id])
        return _answer(DONE)


def _answer(body: str, status: int = 200) -> web.Response:
    return web.Response(text=PAGE.format(body=body), content_type="text/html", headers=HEADERS, status=status)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>A token for a terminal - Aeolian</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 34rem; margin: 3rem auto; padding: 0 1rem; }}
label {{ display: block; margin: 1rem 0; }}
input {{ display: block; width: 100%; font: inherit; padding: .4rem; }}
button {{ font: inherit; padding: .4rem 1rem; }}
[role=alert] {{ border-left: .3rem solid #c33; padding-left: 1rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
FORM = """<h1>A terminal asks for a token</h1>
<p>It gets one that may do what yours may. Approve only if you have started <code>modal token new</code> or
<code>modal setup</code> yourself.</p>
{problem}
<form method="post" autocomplete="off">
<label>The code that the terminal shows <input name="code" required autofocus></label>
<label>Id of your token <input name="token_id" placeholder="ak-..." required></label>
<label>Its secret <input name="token_secret" type="password" placeholder="as-..." required></label>
<button>Approve</button>
</form>
<p>No token yet? <code>aeolian connect</code> on the server's machine gives you one.</p>
"""
DONE = "<h1>Approved</h1><p>The terminal has its token now. You can close this page.</p>"
