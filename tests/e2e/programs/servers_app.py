"""Two servers, of which one is not open to everybody, and functions that look at their network."""

import socket
import subprocess
import sys

import modal

app = modal.App("servers-e2e")
PORT = 8000
SERVER = """
import http.server, os, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/die":
            os._exit(1)
        if self.path == "/slow":
            time.sleep(1.5)
        if self.headers.get("Upgrade"):
            self.send_response(101)
            self.send_header("Upgrade", "echo")
            self.send_header("Connection", "Upgrade")
            self.end_headers()
            while data := self.connection.recv(1 << 16):
                self.connection.sendall(data)
            self.close_connection = True
            return
        self.answer(0)

    def do_POST(self):
        self.answer(len(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, size):
        body = f"{os.environ['MODAL_TASK_ID']} {self.path} {size}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 200

Server(("0.0.0.0", 8000), Handler).serve_forever()
"""


@app.server(port=PORT, routing_region="us-east", unauthenticated=True, scaledown_window=4, target_concurrency=100)
class Open:
    @modal.enter()
    def start(self):
        self.process = subprocess.Popen([sys.executable, "-c", SERVER])

    @modal.exit()
    def stop(self):
        print("the exit hook ran", flush=True)
        self.process.terminate()


@app.server(port=PORT, routing_region="us-east")
class Closed:
    @modal.enter()
    def start(self):
        self.process = subprocess.Popen([sys.executable, "-c", SERVER])


@app.server(port=PORT, routing_region="us-east", unauthenticated=True)
class Failing:
    @modal.enter()
    def start(self):
        raise RuntimeError("the model is missing")


@app.function(block_network=True)
def look_without_network(size: int) -> tuple[str, bytes]:
    """Large outputs reach the gateway all the same."""
    try:
        socket.create_connection(("192.0.2.1", 80), 2).close()
        reached = "connected"
    except OSError as error:
        reached = str(error)
    return reached, bytes(size)


@app.function()
def tunnel_to_a_server(is_unencrypted: bool) -> str:
    server = socket.create_server(("127.0.0.1", 0))
    with server, modal.forward(server.getsockname()[1], unencrypted=is_unencrypted) as tunnel:
        address = tunnel.tcp_socket if is_unencrypted else tunnel.tls_socket
        modal.Queue.from_name("tunnels", create_if_missing=True).put(list(address))
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"hello, " + connection.recv(100))
    return "done"
