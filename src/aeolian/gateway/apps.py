"""The page of an App: where the links lead that the client prints. Its id, which nobody can guess, is the key to it.

It shows how the App fares and which commands tell more; what containers print may be secret, and is not shown.
"""

import html
from datetime import UTC, datetime

from aiohttp import web

from aeolian.control.apps import Apps
from aeolian.control.functions import Functions
from aeolian.domain.apps import App
from aeolian.domain.errors import NotFound

HEADERS = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


class AppPages:
    def __init__(self, apps: Apps, functions: Functions):
        self._apps = apps
        self._functions = functions

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/apps/{app_id}", self.show), web.get("/apps/{app_id}/logs", self.show)]

    async def show(self, request: web.Request) -> web.Response:
        app_id = request.match_info["app_id"]
        app = await self._apps.look_up(app_id)
        if app is None:
            raise NotFound(f"there is no App {app_id!r}")
        names = sorted(self._functions.layout(app_id).functions)
        page = _page(app, names, self._apps.fleet.num_containers(app_id))
        return web.Response(text=page, content_type="text/html", headers=HEADERS)


def _page(app: App, function_names: list[str], num_containers: int) -> str:
    title = html.escape(app.name or app.description or app.app_id)
    rows = [
        ("App", app.app_id),
        ("Environment", app.environment_name),
        ("State", app.state.value.replace("_", ", ")),
        ("Version", f"v{app.version}" if app.deployed_at and app.version else ""),
        ("Created", _time(app.created_at)),
        ("Deployed", _time(app.deployed_at)),
        ("Stopped", _time(app.stopped_at)),
        ("Containers", "" if app.has_ended else str(num_containers)),
        ("Functions", ", ".join(function_names)),
    ]
    table = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in rows if value)
    commands = [f"modal app logs {app.app_id}", f"modal app info {app.app_id}"]
    if not app.has_ended:
        commands += [f"modal app logs -f {app.app_id}", f"modal app stop {app.app_id}"]
    return PAGE.format(title=title, table=table, commands="\n".join(commands))


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if at else ""


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title} - Aeolian</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem; }}
th {{ text-align: left; padding-right: 2rem; vertical-align: top; font-weight: 600; }}
pre {{ background: #8882; padding: 1rem; border-radius: .4rem; overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>{table}</table>
<p>More of it in a terminal:</p>
<pre>{commands}</pre>
</body>
</html>
"""
