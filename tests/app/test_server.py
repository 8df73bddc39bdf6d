"""What the server accepts and says: loopback, Host header, security headers, no foreign address."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.components import PLOTLY_URL
from app.server import _options, require_free_port
from mhpo_core.errors import ServerError
from tests.app.runs import record_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    runs = tmp_path_factory.mktemp("runs")
    record_run(runs / "run", 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "app.cli", "dash", str(runs), "--port", str(number)]
    # a user's own configuration must not open the server
    hostile = {"STREAMLIT_SERVER_ADDRESS": "0.0.0.0", "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "true"}
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, **hostile}, text=True)
    assert server.stderr is not None
    line = server.stderr.readline()
    assert f"Dashboard: http://127.0.0.1:{number}" in line, line
    yield number
    server.terminate()
    assert server.wait(30) == 0
    assert server.stderr.read() == "", "a clean end says nothing"


def get(port: int, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers)
    return connection.getresponse()


def handshake(port: int, host: str, origin: str) -> int:
    request = (
        f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        peer.sendall(request.encode())
        return int(peer.recv(100).split()[1])


def test_only_loopback_listens(port: int) -> None:
    listed = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True) if _has("ss") else None
    if listed is not None:
        lines = [line.split()[3] for line in listed.stdout.splitlines() if line.split()[3].endswith(f":{port}")]
        assert lines == [f"127.0.0.1:{port}"]
    others = {a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        if address.startswith("127."):
            continue
        with pytest.raises(OSError), socket.create_connection((address, port), timeout=2):
            pass


def _has(program: str) -> bool:
    import shutil

    return shutil.which(program) is not None


def test_dns_rebinding_and_foreign_pages_are_refused(port: int) -> None:
    good = f"127.0.0.1:{port}"
    assert handshake(port, good, f"http://{good}") == 101
    assert handshake(port, good, "http://attacker.example") == 403
    assert handshake(port, f"attacker.example:{port}", f"http://attacker.example:{port}") == 403
    assert handshake(port, good, "null") == 403
    assert get(port, PLOTLY_URL, Host="attacker.example").status == 403
    assert get(port, "/", Host=f"localhost:{port}").status == 200


@pytest.mark.parametrize("path", ["/", PLOTLY_URL, "/_stcore/health", "/runs", "/nothing-here"])
def test_security_headers_on_every_answer(port: int, path: str) -> None:
    response = get(port, path)
    policy = dict(p.strip().split(" ", 1) for p in response.getheader("Content-Security-Policy", "").split(";"))
    assert (
        policy["default-src"] == "'self'"
        and policy["connect-src"] == "'self'"
        and policy["frame-ancestors"] == "'none'"
    )
    assert "unsafe-inline" not in policy["script-src"] and "unsafe-eval" not in policy["script-src"].replace(
        "wasm-unsafe-eval", ""
    )
    assert "http" not in response.getheader("Content-Security-Policy", "")
    assert response.getheader("X-Content-Type-Options") == "nosniff"
    assert response.getheader("X-Frame-Options") == "DENY"


def test_plotly_comes_from_the_installed_wheel(port: int) -> None:
    response = get(port, PLOTLY_URL)
    body = response.read()
    assert response.status == 200 and "immutable" in response.getheader("Cache-Control", "")
    assert re.search(rb"plotly\.js v\d", body[:200])


def test_numbers_for_prometheus_are_not_served_unless_asked_for(port: int) -> None:
    assert b"mhpo_step" not in get(port, "/metrics").read()


def test_host_config_trusts_no_foreign_origin(port: int) -> None:
    assert b"streamlit.app" not in get(port, "/_stcore/host-config").read()


def test_usage_statistics_are_off() -> None:
    options = _options("127.0.0.1", 8501)
    assert options["browser.gatherUsageStats"] is False
    assert options["server.address"] == "127.0.0.1"


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerError, match="is not free"):
            require_free_port("127.0.0.1", taken.getsockname()[1])
