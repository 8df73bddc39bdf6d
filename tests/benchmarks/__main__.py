"""Run the benchmarks named on the command line, or all of them, and print Markdown tables."""

from __future__ import annotations

import os
import platform
import sys
from importlib import import_module
from pathlib import Path

BENCHMARKS = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))


def machine() -> str:
    """Processor, cores and load, so that a figure can be judged."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"


def main() -> int:
    wanted = sys.argv[1:] or BENCHMARKS
    unknown = sorted(set(wanted) - set(BENCHMARKS))
    if unknown:
        print(f"benchmarks: unknown {', '.join(unknown)}, valid are {', '.join(BENCHMARKS)}.", file=sys.stderr)
        return 2
    print(f"Machine: {machine()}\n")
    for name in wanted:
        module = import_module(f"tests.benchmarks.{name}")
        print(f"## {(module.__doc__ or name).strip().splitlines()[0]}\n", flush=True)
        for line in module.run():
            print(line, flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
