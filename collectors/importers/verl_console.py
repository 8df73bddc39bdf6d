"""verl's console log (`trainer.logger=["console"]`): lines `step:N - name:value - …` among everything else.

Ray puts `(TaskRunner pid=…)` before them, terminals colours, and progress bars stand on the same line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from collectors.importers.rows import joined, natural
from collectors.importers.steps import ImportedStep, Notes
from collectors.importers.text import head, lines, step_number
from mhpo_core.errors import StoreError

_HEAD = 1 << 20
_SUFFIXES = (".log", ".txt", ".out", ".err")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
# tqdm pads the percentage to three characters; at 100 they may follow a value without a space
_PERCENT = re.compile(r"(?:100|[ ][ 0-9][0-9])%\|")
# not training/global_step:N and timing_s/step:1.5
_STEP = re.compile(r"(?<![\w/.-])step([:=]) {0,3}([0-9]{1,18})(?=\s{1,3}-\s|\s*$)")
# every repetition is bounded: a line may be anything, and as long as it likes
_NUMBER = (
    r"([-+]?(?:nan|inf(?:inity)?|(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:e[-+]?[0-9]{1,9})?)|true|false)"
)
_WRAPPED = rf"(?:\w{{1,20}}\.)?\w{{1,20}}\( {{0,3}}\[?{_NUMBER}\]?(?:, {{0,3}}\w{{1,20}}=[^()]{{0,100}})?\)"
_BARE = rf"{_NUMBER}(?=$|[\s(\[{{<,}})]|(?-i:[A-Z]))"
_VALUE = rf"(?:{_WRAPPED}|\[{_NUMBER}\]|{_BARE})"
_ITEM = re.compile(rf"\s{{0,9}}([^\s:'\"](?:[^:'\"]{{0,300}}?[^\s:'\"])?): ?{_VALUE}", re.IGNORECASE)
_NAME = r"(['\"])([^'\"/]{1,200}/[^'\"]{1,200})\1"
_QUOTED = re.compile(rf"(?:\([^()]{{1,100}}\))?[\s{{(]{{0,9}}{_NAME}: {{0,3}}{_VALUE}[,}})\s]{{0,9}}", re.IGNORECASE)
_BRAND = re.compile(r"\bverl[./]trainer\b|\((?:TaskRunner|main_task|WorkerDict)\b[^)\n]{0,80}pid=")
_TELLING = re.compile(r"\s-\s(?:actor|critic|response_length|training|val-core|val-aux)/")
_CUT = "The last line is cut off; its last value is left out"


class VerlConsole:
    """Logs have no fixed place: the file itself, or *.log, *.txt, *.out and *.err in a folder."""

    name = "verl-console"
    title = "verl console log"
    framework = "verl"

    def find(self, path: Path) -> list[Path]:
        """The file if its beginning names verl or its metrics, or such files in the folder."""
        if path.is_file():
            return [path] if _is_ours(path) else []
        found = (file for file in path.glob("*") if file.suffix in _SUFFIXES and file.is_file())
        return sorted((file for file in found if _is_ours(file)), key=natural)

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """The steps of the files one after the other; training/global_step is the step where a step has it.

        Raises:
            StoreError: no line of any file holds the metrics of a step.
        """
        count = 0
        for file in files:
            before = count
            for step in joined(_steps(file, notes), notes):
                count += 1
                yield step
            if count == before:
                notes.add("A log holds no metrics of a step", file.name)
        if not count:
            named = ", ".join(str(file) for file in files[:10])
            raise StoreError(
                f"import: {named} holds no metrics of a step, allowed is a console log of verl with lines "
                "`step:N - name:value`. Set trainer.logger=[console,file] and train one step."
            )


def _is_ours(path: Path) -> bool:
    text = head(path, _HEAD)
    if "\x00" in text or re.match(r'\s*(?:\{|\[\s*[{\["])', text):
        return False
    if _BRAND.search(text):
        return True
    steps = ((line, _STEP.search(line)) for line in _ANSI.sub("", text).splitlines())
    return any(step and _TELLING.search(line, step.end()) for line, step in steps)


def _steps(path: Path, notes: Notes) -> Iterator[ImportedStep]:
    """Steps with at least one metric, each once the next one begins."""
    step: ImportedStep | None = None
    in_lines = False  # `step=N` is followed by lines of one metric each
    for line, text, ends in lines(path, notes):
        parts = _PERCENT.sub(" ", _ANSI.sub("", text)).split("\r")
        for index, part in enumerate(parts):
            where, whole = f"line {line} of {path.name}", ends or index < len(parts) - 1
            begins = list(_STEP.finditer(part))
            if not begins and step is not None and in_lines:
                _add_quoted(step, part, whole, where, notes)
            for match, end in zip(begins, [*(m.start() for m in begins[1:]), len(part)], strict=False):
                if step is not None and step.metrics:
                    yield _numbered(step)
                step, in_lines = ImportedStep(int(match[2])), match[1] == "="
                _add_items(step, part[match.end() : end], whole or end < len(part), where, notes)
    if step is not None and step.metrics:
        yield _numbered(step)


def _numbered(found: ImportedStep) -> ImportedStep:
    told = step_number(found.metrics.get("training/global_step"))
    found.step = found.step if told is None else told
    return found


def _add_items(step: ImportedStep, text: str, whole: bool, where: str, notes: Notes) -> None:
    """Take the `name:value` between the dashes."""
    items = re.split(r"\s-(?:\s|$)", text)[1:]
    for index, item in enumerate(items):
        match = _ITEM.match(item)
        if match and not whole and index == len(items) - 1 and match.end() == len(item):
            notes.add(_CUT, where)
        elif match:
            _put(step, match[1], match.groups()[1:])
        elif item.strip() and not item.rstrip().endswith((":None", ": None")):
            notes.add("A part of a step's line is no number and is left out", f"{where}, {item[:60]!r}")


def _add_quoted(step: ImportedStep, text: str, whole: bool, where: str, notes: Notes) -> None:
    """Take a line `'name': value`."""
    match = _QUOTED.fullmatch(text)
    if match and not whole and text[-1] not in ",})":
        notes.add(_CUT, where)
    elif match:
        _put(step, match[2], match.groups()[2:])


def _put(step: ImportedStep, name: str, values: tuple[str | None, ...]) -> None:
    given = next(value for value in values if value)
    truth = {"t": 1.0, "f": 0.0}.get(given[0].lower())
    step.metrics[name] = float(given) if truth is None else truth


FORMAT = VerlConsole()
