"""Sends one message to the addresses in MHPO_NOTIFY, in a process of its own; `collectors.notify` starts it.

A process, because an address is a secret: what libraries log of it here is heard by nobody. It also outlives a
trainer that dies, and a server that never answers can be left behind. Imports nothing of this project, which would
take seconds.

    in   {"title": …, "body": …, "seconds": …}          out   one problem per address, empty where it was delivered
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from typing import Any


def send(address: str, title: str, body: str) -> str:
    """The problem in words that do not contain the address; empty if there is none."""
    apprise: Any = importlib.import_module("apprise")
    try:
        asset = apprise.AppriseAsset(storage_mode="memory")  # nothing of it on the disk
        sender = apprise.Apprise(asset=asset)
        if not sender.add(address):
            return "is none that apprise knows"
        taken = sender.notify(title=title, body=body, body_format=apprise.NotifyFormat.TEXT)
        return "" if taken else "did not take it"
    except Exception as error:
        return f"failed ({type(error).__name__})"


def main() -> None:
    """Send to all addresses at once, and wait for them until the time is up."""
    message = json.load(sys.stdin)
    importlib.import_module("apprise")  # slow from some disks, and no fault of an address
    addresses = os.environ["MHPO_NOTIFY"].split()
    problems = ["did not answer in time"] * len(addresses)

    def work(index: int) -> None:
        problems[index] = send(addresses[index], message["title"], message["body"])

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(addresses))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + message["seconds"]
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    print(json.dumps(problems), flush=True)
    os._exit(0)  # without waiting for threads that hang


if __name__ == "__main__":
    main()
