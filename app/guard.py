"""ASGI middleware that keeps the dashboard on this machine and model text harmless."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LocalOnly:
    """Refuses a request whose Host or Origin is not this machine.

    Against pages of other sites: a name that resolves to 127.0.0.1 (DNS rebinding) is in Host, a foreign page is in
    Origin. It stands before Streamlit's own check, which asks a server on the internet for this machine's address when
    it sees a foreign origin.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or _is_local(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"Only addresses of this machine are served."})


def _is_local(scope: Scope) -> bool:
    headers = {k.lower(): v.decode("latin-1") for k, v in scope["headers"]}
    host = urlsplit("//" + headers.get(b"host", ""))
    if host.hostname not in LOOPBACK:
        return False
    origin = headers.get(b"origin")
    return origin is None or urlsplit(origin).netloc == host.netloc


class SecurityHeaders:
    """ASGI middleware: a content security policy without inline scripts and without any other host."""

    def __init__(self, app: Application, inline_scripts: list[str]) -> None:
        self._app = app
        hashes = "".join(f" '{h}'" for h in inline_scripts)
        policy = (
            f"default-src 'self'; script-src 'self' 'wasm-unsafe-eval'{hashes}; style-src 'self' 'unsafe-inline'; "
            "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
            "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "permissions-policy": "camera=(), microphone=(), geolocation=()",
        }
        self._headers = [(k.encode(), v.encode()) for k, v in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                ours = {name for name, _ in self._headers}
                kept = [(k, v) for k, v in message["headers"] if k.lower() not in ours]
                message = {**message, "headers": [*kept, *self._headers]}
            await send(message)

        await self._app(scope, receive, with_headers)
