"""What a reader of a format yields, and what every reader has to offer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mhpo_core.batch import Sequences, TokenBatch
from mhpo_core.errors import StoreError


@dataclass
class ImportedStep:
    """What one source says about one optimizer step.

    Args:
        step: as the framework counts it.
        metrics: scalars under the framework's own names; NaN and ±Inf are data, what is unknown is absent.
        batch: the tokens, None where the source has none.
        ratio_known: False where the source has no log-probabilities of the policy being trained; `batch.logp_new` then
            holds `batch.logp_old`.
        sequences: completions, None where the source has none.
        gradient_norms: parameter group → L2 norm before clipping.
        wall_time: seconds since the epoch.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    batch: TokenBatch | None = None
    ratio_known: bool = True
    sequences: Sequences | None = None
    gradient_norms: dict[str, float] = field(default_factory=dict)
    wall_time: float | None = None


class Notes:
    """What a source has that could not be taken as it is; each kind is told once, with its number and first example."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, example: str = "") -> None:
        """Note one more of a kind.

        Args:
            kind: a sentence without its full stop, the same for all of its kind.
            example: where it was seen.
        """
        self._count[kind] += 1
        self._first.setdefault(kind, example)

    def __iter__(self) -> Iterator[str]:
        for kind, count in self._count.items():
            first = f" (first: {self._first[kind]})" if self._first[kind] else ""
            yield f"{kind}{f', {count} times' if count > 1 else ''}{first}."


class NotYet(StoreError):
    """Files of a format of which none is complete; they count only where no other format is found."""


class SeveralRuns(StoreError):
    """Files of a format that are of several trainings; beside another format they are left out."""


class Format(Protocol):
    """A file format of another tool.

    Args:
        name: what `--format` takes.
        title: what it is, for people.
        framework: key of `names.TABLES` and `diagnostics.ADVICE`.
    """

    name: str
    title: str
    framework: str

    def find(self, path: Path) -> list[Path]:
        """Files of this format: the path itself, or those below it; empty if there are none. Reads little of each.

        Raises:
            NotYet: there are some, and none of them is complete.
        """
        ...

    def steps(self, files: list[Path], notes: Notes) -> Iterator[ImportedStep]:
        """The steps in the order of the files, each once complete; memory does not grow with the files.

        Raises:
            StoreError: a file is not what `find` took it for.
            SeveralRuns: before the first step.
        """
        ...
