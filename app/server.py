"""The dashboard's server: Streamlit on loopback, with the headers and settings that keep it there."""

from __future__ import annotations

import base64
import gc
import hashlib
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from app import session, settings
from app.guard import LOOPBACK, LocalOnly, SecurityHeaders
from app.prometheus import require_prometheus, scraper
from app.theme import streamlit_options
from mhpo_core.errors import ServerError

DEFAULT_PORT = 8501


def require_free_port(host: str, port: int) -> None:
    """Raise ServerError if nothing can listen there.

    Raises:
        ServerError: the address is not loopback, or the port is taken or not a port.
    """
    if host not in LOOPBACK:
        raise ServerError(
            f"--host: got {host!r}, allowed are {', '.join(LOOPBACK)}, because the dashboard has no login and shows "
            "prompts and completions. Reach it from elsewhere through `ssh -L`."
        )
    if not 0 < port < 65536:
        raise ServerError(f"port: got {port}, allowed are 1 to 65535. Give another with --port (or PORT= for make).")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"port {port} on {host} is not free ({error.strerror}). "
                "Give another with --port (or PORT= for make), or stop what listens there."
            ) from error


def serve(
    runs: Path,
    *,
    host: str = LOOPBACK[0],
    port: int = DEFAULT_PORT,
    run: str = "",
    open_browser: bool = False,
    metrics: bool = False,
) -> None:
    """Serve the dashboard over a folder of runs until SIGINT or SIGTERM.

    Args:
        runs: folder of runs; may be empty or not exist yet.
        host: a loopback address.
        run: the run shown first, may not exist yet; default is the newest.
        open_browser: open the page once it answers.
        metrics: serve the newest numbers of every run at /metrics, for Prometheus.

    Raises:
        ServerError: see require_free_port; or metrics are asked for and prometheus_client is not installed.
    """
    require_free_port(host, port)
    if metrics:
        require_prometheus()
    settings.remember(runs, run)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    threading.Thread(target=_announce, args=(url, open_browser), daemon=True).start()
    # uvicorn raises the signal again after it has shut down; without a handler that would end the process there
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        build_app(runs if metrics else None).run(config=_options(host, port))
    except (KeyboardInterrupt, SystemExit):
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)


def build_app(scraped: Path | None = None) -> Any:
    """The ASGI application: Streamlit, plotly.js from the installed wheel, security headers.

    Args:
        scraped: folder of runs whose numbers are served at /metrics; None = there is no such route.
    """
    import streamlit as st
    from starlette.middleware import Middleware
    from starlette.responses import FileResponse
    from starlette.routing import Route

    from app.components import PLOTLY_SCRIPT, PLOTLY_URL

    async def plotly_script(_: object) -> FileResponse:
        forever = {"Cache-Control": "public, max-age=31536000, immutable"}
        return FileResponse(PLOTLY_SCRIPT, media_type="text/javascript", headers=forever)

    return st.App(
        Path(__file__).parent / "home.py",
        lifespan=_lifespan,
        routes=[Route(PLOTLY_URL, plotly_script), *([] if scraped is None else [_metrics_route(scraped)])],
        middleware=[Middleware(SecurityHeaders, inline_scripts=_inline_scripts()), Middleware(LocalOnly)],
    )


def _metrics_route(runs: Path) -> Any:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    answer = scraper(runs)

    def metrics(request: Request) -> Response:  # not async: it reads files, so it runs in a thread
        body, content_type = answer(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    return Route("/metrics", metrics)


def _inline_scripts() -> list[str]:
    """CSP hashes of the inline scripts of Streamlit's own page, whatever its version."""
    import streamlit

    page = (Path(streamlit.__file__).parent / "static" / "index.html").read_text("utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    return ["sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]


@asynccontextmanager
async def _lifespan(_: object) -> AsyncIterator[None]:
    import duckdb  # noqa: F401
    import pandas  # noqa: F401

    # Streamlit collects garbage after every refresh; frozen, the imported modules are not walked each time (30 ms)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        session.close_followers()


def _options(host: str, port: int) -> dict[str, Any]:
    return {
        "server.address": host,
        "server.port": port,
        "server.headless": True,
        # without it a page of another site reaches the WebSocket by DNS rebinding
        "server.allowedHosts": list(LOOPBACK),
        "server.enableCORS": True,
        "server.enableXsrfProtection": True,
        "server.fileWatcherType": "none",
        "server.maxUploadSize": 1,
        "server.maxMessageSize": 50,
        "server.enableStaticServing": False,
        "browser.gatherUsageStats": False,
        "browser.serverAddress": host,
        "client.showErrorDetails": "type",
        "client.showErrorLinks": False,
        "client.toolbarMode": "viewer",
        "client.allowedOrigins": [],
        "runner.magicEnabled": False,
        "logger.level": "warning",
        "logger.hideWelcomeMessage": True,
        **streamlit_options(),
    }


def _announce(url: str, open_browser: bool) -> None:
    for _ in range(600):
        with suppress(OSError), urllib.request.urlopen(f"{url}/_stcore/health", timeout=1):
            print(f"Dashboard: {url}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
            if open_browser:
                webbrowser.open(url)
            return
        time.sleep(0.1)


def _leave(_: int, __: FrameType | None) -> None:
    raise SystemExit(0)
