"""Web functions of every kind, without a framework."""

import asyncio
import subprocess
import sys

import modal

app = modal.App("web-app")
VERSION = "one"


class Pages:
    """An ASGI application that shows what it is told."""

    def __init__(self):
        self.events = []

    async def __call__(self, scope, receive, send):
        match scope["type"]:
            case "lifespan":
                await self.lifespan(receive, send)
            case "websocket":
                await self.chat(scope, receive, send)
            case "http":
                await getattr(self, scope["path"].strip("/"), self.missing)(scope, receive, send)

    async def lifespan(self, receive, send):
        while True:
            message = await receive()
            self.events.append(message["type"])
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def answer(self, send, text, status=200):
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": text.encode()})

    async def missing(self, scope, receive, send):
        await self.answer(send, "the app knows no such page", 404)

    async def version(self, scope, receive, send):
        await self.answer(send, VERSION)

    async def slow(self, scope, receive, send):
        await asyncio.sleep(0.5)
        await self.answer(send, VERSION)

    async def seen(self, scope, receive, send):
        await self.answer(send, " ".join(self.events))

    async def fail(self, scope, receive, send):
        raise RuntimeError("a bug in the app")

    async def count(self, scope, receive, send):
        """How many bytes came."""
        num_bytes, more = 0, True
        while more:
            message = await receive()
            num_bytes += len(message["body"])
            more = message["more_body"]
        await self.answer(send, str(num_bytes))

    async def zeros(self, scope, receive, send):
        """As many bytes as the query says."""
        left = int(scope["query_string"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % left)]})
        while left:
            piece = bytes(min(left, 1 << 20))
            left -= len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": left > 0})

    async def events_forever(self, scope, receive, send):
        """Server-sent events, until the client goes."""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        gone = asyncio.create_task(self.until_gone(receive))
        number = 0
        while not gone.done():
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            number += 1
            await asyncio.sleep(0.05)
        self.events.append("client-gone")

    async def until_gone(self, receive):
        while (await receive())["type"] != "http.disconnect":
            pass

    async def chat(self, scope, receive, send):
        await receive()
        await send({"type": "websocket.accept", "subprotocol": scope["subprotocols"][0]})
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                self.events.append(f"closed-{message['code']}")
                return
            await send({"type": "websocket.send", "text": f"you said {message['text']}"})


@app.function(scaledown_window=30)
@modal.concurrent(max_inputs=100)
@modal.asgi_app()
def pages():
    return Pages()


@app.function(scaledown_window=30, max_containers=1)
@modal.concurrent(max_inputs=100)
@modal.asgi_app()
def alone():
    return Pages()


@app.function(scaledown_window=30)
@modal.concurrent(max_inputs=100)
@modal.asgi_app(label="guarded", requires_proxy_auth=True)
def guarded():
    return Pages()


@app.cls(scaledown_window=30)
class Shop:
    @modal.enter()
    def open(self):
        self.is_open = True

    @modal.wsgi_app()
    def counter(self):
        def serve(environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [f"{environ['REQUEST_METHOD']} {self.is_open} ".encode(), environ["wsgi.input"].read()]

        return serve


@app.function(scaledown_window=30)
@modal.web_server(8765, startup_timeout=30)
def files():
    subprocess.Popen([sys.executable, "-m", "http.server", "8765", "--directory", "/"])
