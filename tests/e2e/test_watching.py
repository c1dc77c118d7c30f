"""What operators look at: metrics, traces at a collector, and the server's own logs as JSON."""

import base64
import gzip
import json
import shutil
import tempfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from faults import eventually
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from running import RunningAeolian

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana-dashboard.json"
APP = """
    import modal

    app = modal.App("watched")

    @app.function()
    def inner(x):
        return x + 1

    @app.function()
    def outer(x):
        if x < 0:
            raise ValueError("negative")
        return inner.remote(x) * 2

    @app.local_entrypoint()
    def main():
        assert [outer.remote(x) for x in (1, 2)] == [4, 6]
        try:
            outer.remote(-1)
        except ValueError:
            print("all is well")
"""


class Collector:
    """Takes traces as an OpenTelemetry collector does: by HTTP, as protobuf."""

    def __init__(self):
        spans: list = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        self.spans = spans
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def watched():
    """(running Aeolian, the collector of its traces)"""
    folder = Path(tempfile.mkdtemp(prefix="aeolian-watched-"))
    collector = Collector()
    ports = ("--grpc-port", "0", "--http-port", "0", "--web-port", "0")
    options = (*ports, "--log-format", "json", "--otlp-endpoint", collector.url)
    running = RunningAeolian(folder / "data", "process", *options).start()
    yield running, collector
    running.stop()
    collector.close()
    shutil.rmtree(folder, ignore_errors=True)


def metrics_of(aeolian: RunningAeolian) -> list:
    """What Prometheus would read."""
    environment = aeolian.environment
    settings = json.loads((aeolian.data_dir / "run/settings.json").read_bytes())
    token = f"{environment['MODAL_TOKEN_ID']}:{environment['MODAL_TOKEN_SECRET']}"
    authorization = f"Basic {base64.b64encode(token.encode()).decode()}"
    request = urllib.request.Request(f"{settings['http_url']}/metrics", headers={"Authorization": authorization})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return list(text_string_to_metric_families(reply.read().decode()))


def test_a_run_is_seen_in_metrics_traces_and_logs(watched, tmp_path):
    aeolian, collector = watched
    assert "all is well" in aeolian.run_app(APP, tmp_path)

    families = metrics_of(aeolian)
    found = {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }
    outer = ("(ephemeral)", "outer")
    assert found["aeolian_inputs_total", *outer, "success"] == 2
    assert found["aeolian_inputs_total", *outer, "failure"] == 1
    assert found["aeolian_container_start_seconds_count", *outer] >= 1
    assert found["aeolian_container_start_hook_seconds_count", "user code"] >= 2
    assert found["aeolian_rpc_seconds_count", "OK", "FunctionMap"] == 5
    assert any(name[0] == "aeolian_worker_cores" for name in found)
    used = {name for name in _words(DASHBOARD.read_text()) if name.startswith("aeolian_")}
    known = {family.name + end for family in families for end in ("", "_total", "_sum", "_count", "_bucket")}
    assert used and not used - known, "the dashboard asks for what there is not"

    def calls_seen() -> list:
        return [span for span in collector.spans if span.name.startswith("call ")]

    eventually(lambda: len(calls_seen()) < 5, "traces are missing")
    calls = calls_seen()
    roots = {span.span_id: span for span in calls if not span.parent_span_id}
    children = [span for span in calls if span.parent_span_id]
    assert sorted(span.name for span in roots.values()) == ["call (ephemeral).outer"] * 3
    assert [span.name for span in children] == ["call (ephemeral).inner"] * 2
    assert all(roots[span.parent_span_id].trace_id == span.trace_id for span in children)
    names = {span.name for span in collector.spans}
    assert {"queued", "container start", "user code", "run", "store output"} <= names

    lines = [json.loads(line) for line in (aeolian.data_dir / "logs/server.log").read_text().splitlines()]
    assert any(line["message"].startswith("serving on") for line in lines)
    assert all({"time", "level", "process", "message"} <= line.keys() for line in lines)
    assert all(line.startswith("{") for line in aeolian.log.read_text().splitlines())


def _words(text: str) -> list[str]:
    for sign in '"(){}[],\\ =':
        text = text.replace(sign, " ")
    return text.split()
