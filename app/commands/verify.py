"""`mhpo verify RUN [--json]`"""

from __future__ import annotations

import argparse
import json
import sys

from app.text import human_bytes, visible
from collectors.integrity import Finding, Verification, verify
from collectors.storage import open_storage

_FINDING = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of one run, or s3://bucket/folder")
    parser.add_argument("--json", action="store_true", help="print JSON alone")


def run(options: argparse.Namespace) -> int:
    found = verify(open_storage(options.run_folder), _progress if sys.stderr.isatty() else lambda done, total: None)
    if options.json:
        print(json.dumps(_as_json(found), indent=2))
    else:
        _print(found)
    return _FINDING if found.findings else 0


def _as_json(found: Verification) -> dict[str, object]:
    return {
        "files": found.files, "bytes": found.size, "steps": found.steps, "tokens": found.tokens,
        "leftovers": found.leftovers,
        "findings": [
            {"kind": f.kind, "file": f.name, "first_step": f.steps and f.steps[0], "last_step": f.steps and f.steps[1],
             "detail": f.detail}
            for f in found.findings
        ],
    }  # fmt: skip


def _print(found: Verification) -> None:
    for finding in found.findings:
        print(f"{finding.kind:<9}  {visible(finding.name, 200)}  {_steps(finding)}{visible(finding.detail, 200)}")
    rows = f"{found.steps:,} steps and {found.tokens:,} kept tokens can be read"
    if not found.findings:
        print(f"Intact: {found.files:,} files, {human_bytes(found.size)}; {rows}.")
        return
    print(f"{len(found.findings):,} of {found.files:,} files are not as they were written; {rows}.")
    print("Restore them from a copy, or leave them: every command passes over them and opens the rest.")


def _steps(finding: Finding) -> str:
    if finding.steps is None:
        return ""
    first, last = finding.steps
    return f"step {first}: " if first == last else f"steps {first} to {last}: "


def _progress(done: int, total: int) -> None:
    if done == total:
        sys.stderr.write("\r\x1b[K")
    elif done % 64 == 0:
        sys.stderr.write(f"\r\x1b[Kverify {done:,}/{total:,} files")
    sys.stderr.flush()
