"""A dashboard in a process of its own and a browser on it, as a user has them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.e2e.browser import launch

ROOT = Path(__file__).parents[2]
ARTIFACTS = ROOT / "artifacts"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mhpo(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "app.cli", *map(str, arguments)]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"{what}: not within {seconds} s"
        time.sleep(0.1)


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, ended as Ctrl-C would, and killed if that does not help."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        try:
            yield process
        finally:
            interrupt(process)


def interrupt(process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = launch(playwright)
        yield chromium
        chromium.close()


class Watched:
    """A page that remembers what went wrong in it and where it asked for something."""

    def __init__(self, browser: Browser, url: str, scheme: str = "dark", width: int = 1440, height: int = 900) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=False
        )
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda e: self.problems.append(f"exception: {e.stack}"))
        self.page.on("request", lambda r: self._request(r.url))
        self.page.goto(url)

    def _console(self, message: object) -> None:
        if message.type == "error":  # type: ignore[attr-defined]
            self.problems.append(message.text)  # type: ignore[attr-defined]

    def _request(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            self.foreign.append(url)

    def board(self, name: str) -> str:
        """A data attribute of the board, empty while there is none."""
        found = self.page.locator(".mhpo-board")
        return (found.get_attribute(f"data-{name}") or "") if found.count() else ""

    def wait_drawn(self, seconds: float = 40) -> None:
        self.page.locator(".mhpo-board[data-renders]").wait_for(timeout=seconds * 1000)

    def screenshot(self, name: str) -> None:
        ARTIFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"{name}.png")

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def watch(browser: Browser) -> Iterator[Callable[..., Watched]]:
    opened: list[Watched] = []

    def open_page(url: str, **options: object) -> Watched:
        opened.append(Watched(browser, url, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_page
    for page in opened:
        page.close()


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Starts `mhpo dash` on a folder; returns its address."""
    with_exit: list[object] = []

    def start(runs: Path) -> str:
        port = free_port()
        log = tmp_path / f"dash-{port}.log"
        context = running(mhpo("dash", runs, "--port", str(port)), log)
        context.__enter__()
        with_exit.append(context)
        wait_until(lambda: b"Dashboard:" in log.read_bytes(), 40, "the dashboard answers")
        return f"http://127.0.0.1:{port}"

    yield start
    for context in with_exit:
        context.__exit__(None, None, None)  # type: ignore[attr-defined]
