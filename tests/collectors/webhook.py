"""A web server on loopback that takes messages, refuses them, or never answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "s3cr3t-t0ken"


class Webhook:
    """What came, and how it answers."""

    def __init__(self, how: str) -> None:
        self.messages: list[dict[str, Any]] = []
        self.asked = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.set()
                if how == "drips":  # no single wait is long
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                    while not outer.ended.wait(0.1):
                        self.wfile.write(b"x")
                elif how == "hangs":
                    outer.ended.wait(60)
                else:
                    outer.messages.append(body)
                    self.send_response(500 if how == "fails" else 200)
                    self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with suppress(OSError):  # the sender gave up
                    super().handle()

        self.ended = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"json://127.0.0.1:{self.server.server_port}/{SECRET}"


@contextmanager
def webhook(how: str = "takes") -> Iterator[Webhook]:
    """how: "takes" messages, "fails" with 500, "hangs", or "drips" an answer that never ends."""
    made = Webhook(how)
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.ended.set()
        made.server.shutdown()
        made.server.server_close()
        thread.join()


def nobody() -> str:
    """An address where nothing listens."""
    with webhook() as gone:
        address = gone.address
    time.sleep(0.01)
    return address
