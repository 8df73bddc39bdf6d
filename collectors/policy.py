"""Which tokens of a step are kept, and for how long.

Shape letters: B sequences, N trained tokens of a step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mhpo_core.errors import StoreError

ALL, SAMPLE, FLIGHT = "all", "sample", "flight"
RING_STEPS = 256
SAMPLED_SEQUENCES = 8
TAIL_TOKENS = 64
"""Largest, and as many smallest, log-ratios of a step that the flight recorder keeps for ever; non-finite ones too."""

TAIL_TEXTS = 8
"""Of that many tokens of each tail the whole completion's text is kept."""

RING, ALWAYS, SAMPLED, LOW_TAIL, HIGH_TAIL, NON_FINITE = range(6)
REASONS = ("ring", "all", "sample", "low tail", "high tail", "non-finite")
"""`kept_because` by code; a token of the ring that was pinned says "pinned"."""

_GIVEN = re.compile(r"(all)|sample:([1-9]\d{0,8})|flight(?::([1-9]\d{0,8}))?", re.ASCII)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", re.IGNORECASE | re.ASCII)
SMALLEST_LIMIT = 16_000_000


@dataclass(frozen=True)
class TokenPolicy:
    """What is kept of the tokens of a step.

    Args:
        kind: "all"; "sample" (whole sequences, drawn uniformly); "flight" (all tokens of the last steps in a ring, and
            of every step a uniform sample of sequences and both tails of the log-ratio).
        sequences: sequences sampled per step.
        ring: steps in the ring.
    """

    kind: str = FLIGHT
    sequences: int = SAMPLED_SEQUENCES
    ring: int = RING_STEPS

    @classmethod
    def parse(cls, text: str) -> TokenPolicy:
        """From "all", "sample:N", "flight" or "flight:K".

        Raises:
            StoreError: anything else.
        """
        found = _GIVEN.fullmatch(text) if isinstance(text, str) else None
        if not found:
            raise StoreError(
                f"Recorder: tokens is {text!r}, allowed are 'all', 'sample:N' (N sequences of every step) and "
                "'flight:K' (all of the last K steps, a sample and both tails of every step). Give one of them."
            )
        if found[1]:
            return cls(ALL, 0, 0)
        if found[2]:
            return cls(SAMPLE, int(found[2]), 0)
        return cls(FLIGHT, ring=int(found[3] or RING_STEPS))

    def __str__(self) -> str:
        return {ALL: ALL, SAMPLE: f"{SAMPLE}:{self.sequences}", FLIGHT: f"{FLIGHT}:{self.ring}"}[self.kind]

    def choose(self, row: NDArray[np.intp], log_ratio: NDArray[np.floating], sequence_id: NDArray[np.int64]) -> Choice:
        """Why each token of a step is kept.

        Args:
            row: (N,), the sequence of each trained token, in [0, B).
            log_ratio: (N,), nats.
            sequence_id: (B,).
        """
        n_tokens, n_sequences = len(row), len(sequence_id)
        if self.kind == ALL:
            return Choice(np.full(n_tokens, ALWAYS, np.int8), np.ones(n_sequences, bool))
        sampled = np.zeros(n_sequences, bool)
        sampled[np.argsort(sequence_hash(sequence_id), kind="stable")[: self.sequences]] = True
        reason = np.where(sampled[row], np.int8(SAMPLED), np.int8(RING))
        text = sampled.copy()
        if self.kind == FLIGHT:
            for code, places in _tails(log_ratio).items():
                text[row[places[:TAIL_TEXTS]]] = True
                reason[places[reason[places] == RING]] = code
        return Choice(reason, text)


@dataclass(frozen=True)
class Choice:
    """What is kept of a step.

    Args:
        reason: (N,) int8, an index of REASONS. A token of a sampled sequence counts as sampled whatever its ratio is,
            so that the sample stays uniform.
        text: (B,), True where prompt and completion are kept for ever.
    """

    reason: NDArray[np.int8]
    text: NDArray[np.bool_]


def _tails(log_ratio: NDArray[np.floating]) -> dict[int, NDArray[np.intp]]:
    """Places of the most extreme tokens, most extreme first; each place in one tail."""
    finite = np.flatnonzero(np.isfinite(log_ratio))
    odd = np.flatnonzero(~np.isfinite(log_ratio))[:TAIL_TOKENS]
    count = min(TAIL_TOKENS, len(finite) // 2)
    if not count:
        return {HIGH_TAIL: finite, NON_FINITE: odd}
    values = log_ratio[finite]
    low = np.argpartition(values, count - 1)[:count]
    high = np.argpartition(values, len(values) - count)[-count:]
    low, high = low[np.argsort(values[low])], high[np.argsort(-values[high])]
    return {LOW_TAIL: finite[low], HIGH_TAIL: finite[high], NON_FINITE: odd}


def sequence_hash(sequence_id: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number per sequence that looks random and never changes: SplitMix64's mixing of its id."""
    mixed = sequence_id.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def parse_bytes(given: int | float | str | None, name: str, ranks: int = 1) -> int | None:
    """A number of bytes, as 4_000_000_000, "4GB" or "500 MB"; None = no limit.

    Args:
        ranks: among which it is divided.

    Raises:
        StoreError: anything else, or less than the ranks need.
    """
    if given is None or given == "none":
        return None
    value: float = -1
    if isinstance(given, str) and (found := _BYTES.fullmatch(given)):
        value = float(found[1]) * _UNITS[found[2].upper()]
    elif isinstance(given, int | float) and not isinstance(given, bool):
        value = float(given)
    if not SMALLEST_LIMIT * ranks <= value < 2**60:
        ours = "" if ranks == 1 else f" for {ranks} ranks"
        raise StoreError(
            f"Recorder: {name} is {given!r}, allowed are a number of bytes from {SMALLEST_LIMIT * ranks:,} on{ours}, a "
            "text such as '4GB', or None for no limit. Give one of them."
        )
    return int(value)
