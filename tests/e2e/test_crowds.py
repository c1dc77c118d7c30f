"""Crowds of connections that want nothing, or never finish asking: everybody else is served."""

import contextlib
import json
import resource
import socket
from urllib.parse import urlsplit

import pytest

APP = """
    import modal

    app = modal.App("served")

    @app.function()
    def double(x):
        return 2 * x

    @app.local_entrypoint()
    def main():
        assert list(double.map(range(50))) == [2 * x for x in range(50)]
        assert double.remote(bytes(3 << 20)) == bytes(6 << 20)  # by blobs, over HTTP
        print("all is well")
"""
HALF_A_REQUEST = b"POST /blobs/some HTTP/1.1\r\nHost: here\r\nX-Header: "


@pytest.mark.parametrize("count", [1500, pytest.param(9000, marks=pytest.mark.slow)])
def test_idle_connections_and_half_requests_keep_nobody_waiting(aeolian, tmp_path, count):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 500:
        pytest.skip(f"this host allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    settings = json.loads((aeolian.data_dir / "run/settings.json").read_bytes())
    addresses = [
        (urlsplit(settings[name]).hostname, urlsplit(settings[name]).port) for name in ("grpc_url", "http_url")
    ]
    before = aeolian.memory_mib()
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for number in range(count):
            idle = stack.enter_context(socket.create_connection(addresses[number % 2], timeout=30))
            if number % 20 == 1:
                idle.sendall(HALF_A_REQUEST)
        assert "all is well" in aeolian.run_app(APP, tmp_path)
        assert aeolian.memory_mib() - before < 50 + count // 20
