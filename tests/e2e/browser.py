"""A Chromium for the tests: the one on this machine, or one that is installed now. `python -m tests.e2e.browser`"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, Playwright, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def executable() -> str | None:
    """Path of an installed browser, None if there is none; BROWSER_PATH overrides the search."""
    given = os.environ.get("BROWSER_PATH")
    if given:
        return given
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found or not _MAC.exists():
        return found or _playwright_browser()
    return str(_MAC)


def launch(playwright: Playwright) -> Browser:
    """A headless browser."""
    return playwright.chromium.launch(executable_path=executable(), args=_ARGUMENTS)


def _playwright_browser() -> str | None:
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def install() -> None:
    """Install a browser: Debian's package where apt can, else Playwright's own download."""
    if shutil.which("apt-get"):
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]):
            if subprocess.run([*root, *command], env=environment, stdout=subprocess.DEVNULL).returncode:
                break
    if executable() is None:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"])


if __name__ == "__main__":
    if executable() is None:
        print("No Chromium found; installing one for the browser tests.", flush=True)
        install()
    if executable() is None:
        sys.exit("tests: no browser found and none could be installed. Install Chromium, or set BROWSER_PATH.")
