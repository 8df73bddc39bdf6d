"""The formats that can be read, and which of them lies at a path."""

from __future__ import annotations

from pathlib import Path

from collectors.importers.steps import Format, NotYet
from mhpo_core.errors import StoreError


def _formats() -> dict[str, Format]:
    from collectors.importers import (
        nemo_rl,
        prime_rl,
        rlloggingboard,
        slime,
        tables,
        tensorboard,
        trl_completions,
        trl_state,
        verl_console,
        verl_file,
        verl_rollouts,
        wandb,
    )

    # the more a format has of its own, the earlier it is asked
    found: list[Format] = [
        trl_state.FORMAT, trl_completions.FORMAT, prime_rl.FORMAT, nemo_rl.FORMAT, slime.FORMAT,
        verl_rollouts.FORMAT, verl_file.FORMAT, rlloggingboard.FORMAT, tensorboard.FORMAT, wandb.FORMAT,
        verl_console.FORMAT, tables.FORMAT,
    ]  # fmt: skip
    return {one.name: one for one in found}


FORMATS = _formats()
AUTO, MHPO = "auto", "mhpo"


def recognise(path: Path, wanted: str = AUTO) -> list[tuple[Format, list[Path]]]:
    """Formats at the path with their files. A folder can hold several; a file is of one.

    Raises:
        StoreError: the path does not exist, no format fits, or `wanted` is none or does not fit.
    """
    if wanted != AUTO and wanted not in FORMATS:
        raise StoreError(
            f"import: format {wanted!r} is unknown, allowed are {', '.join([AUTO, MHPO, *FORMATS])}. Give one of them."
        )
    if not path.exists():
        raise StoreError(f"import: {path} does not exist. Give a file or a folder that another tool wrote.")
    asked = FORMATS.values() if wanted == AUTO else [FORMATS[wanted]]
    found: list[tuple[Format, list[Path]]] = []
    taken: set[Path] = set()
    incomplete: NotYet | None = None
    for one in asked:
        try:
            files = [file for file in one.find(path) if file not in taken]
        except NotYet as error:
            incomplete = error
            continue
        if files:
            found.append((one, files))
            taken |= set(files)
    if not found and incomplete is not None:
        raise incomplete
    if not found:
        tried = ", ".join(one.name for one in asked)
        raise StoreError(
            f"import: {path} is in no format that can be read; tried {tried}. Convert it to a table with a column step "
            "(CSV, Parquet or JSONL)."
        )
    return found
