"""The ASGI application that `web.py` asks, as a web function and as a server; `uvicorn web_app:hello` serves it alone."""

import subprocess
import sys

import modal

app = modal.App("benchmark-web")


async def hello(scope, receive, send):
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello"})


@app.function(min_containers=1, max_containers=1)
@modal.concurrent(max_inputs=100)
@modal.asgi_app()
def asgi():
    return hello


@app.server(
    image=modal.Image.debian_slim().pip_install("uvicorn"),
    port=8000,
    routing_region="us-east",
    unauthenticated=True,
    min_containers=1,
    max_containers=1,
)
class Server:
    @modal.enter()
    def start(self):
        command = [sys.executable, "-m", "uvicorn", "web_app:hello", "--host", "0.0.0.0", "--no-access-log"]
        self.process = subprocess.Popen(command, cwd="/root")
