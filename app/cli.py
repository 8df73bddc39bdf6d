"""`mhpo`: one parser, one file per command in `app/commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword

from mhpo_core.errors import MhpoError

COMMANDS = {
    "demo": "a real RL run and the dashboard on it, with one command",
    "train": "train, and record every optimizer step",
    "dash": "serve the dashboard over a folder of runs",
    "runs": "list the runs of a folder",
    "sql": "query a run with read-only SQL",
    "check": "look for collapse in stored runs: failure mode, first signs, advice",
    "backtest": "what other alarm thresholds would have done on stored runs",
    "verify": "check every file of a run",
    "compact": "merge the files of a run into fewer, larger ones; also upgrades an older store",
    "import": "make runs of what other tools have logged or dumped",
    "pin": "keep all tokens of the last steps for good",
}
_BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(_BAD_INPUT, f"{self.prog}: {message}. `{self.prog} --help` shows what is allowed.\n")


def build_parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser with every command of COMMANDS; only the wanted one's module is loaded, since some take seconds."""
    parser = _Parser(prog="mhpo", description="Training-stability diagnostics for RL runs of language models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == wanted:
            module = import_module(f"app.commands.{name}{'_' * iskeyword(name)}")
            module.add_arguments(command)
            command.set_defaults(run=module.run, command=name)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 fine, 1 a finding, 2 bad input."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = build_parser(next(iter(given), None)).parse_args(given)
    try:
        return int(options.run(options) or 0)
    except MhpoError as error:
        print(f"mhpo {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
