"""How far earlier imports into a run have come, noted in an event of the run."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from collectors.importers.steps import ImportedStep
from collectors.reader import open_run
from mhpo_core.batch import Sequences
from mhpo_core.errors import StoreError

EVENT = "imported"


def count_sequences(sequences: Sequences | None) -> int:
    """Number of completions."""
    return 0 if sequences is None else sequences.count()


def fingerprint(found: ImportedStep) -> str:
    """Changes when a step has got more."""
    scalars = sorted(found.metrics.items()), sorted(found.gradient_norms.items())
    batch, tokens = found.batch, None
    if batch is not None:
        tokens = int(batch.mask.sum()), float(batch.logp_old[batch.mask].double().sum())
    told = repr((found.step, scalars, count_sequences(found.sequences), tokens))
    return f"{zlib.crc32(told.encode()):08x}"


def state_of(run: Path) -> dict[str, Any]:
    """What the last import into the run has noted.

    Raises:
        StoreError: the run was recorded, not imported.
    """
    with open_run(run) as opened:
        rows = opened.sql(f"SELECT detail FROM events WHERE kind = '{EVENT}'").fetchall()
    if not rows:
        raise StoreError(f"import: {run} was recorded by a training, not imported. Give another --name.")
    state: dict[str, Any] = json.loads(rows[-1][0])
    if more := recorded(run)[0] - int(state["rows"]):  # an import that was cut short has recorded so many, or not all
        state |= {"records": state["records"] + more, "last": None}
    return state


def recorded(run: Path) -> tuple[int, int]:
    """Rows of all attempts, and tokens that could not be written."""
    with open_run(run) as opened:
        rows, dropped = opened.sql("SELECT count(*), coalesce(sum(dropped_tokens), 0) FROM steps_all").fetchall()[0]
    return int(rows), int(dropped)
