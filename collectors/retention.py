"""Keeps a run below the number of bytes that its user set: what grows, and what goes first.

Every tier has a floor of a fifth of the limit that nothing takes from it, and uses what the others leave. When all is
used, the first tier above its floor gives up its oldest or least telling data: kept tokens are thinned, the ring gets
shorter, old steps lose their texts and then their rows. Four floors are less than the limit, so one tier is always
above its own.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collectors import layout
from collectors.encoding import encode, read_rows
from collectors.layout import StepFile
from collectors.policy import TokenPolicy, sequence_hash
from collectors.storage import Storage

_FLOOR = 0.2
_CAPS = {"ring": 0.35, "pinned": 0.2, "kept": 1.0, "summary": 1.0}
"""Shares of the limit. A user can pin the whole ring at any moment: it and what was pinned before, two floors and the
slack come to less than the limit."""
_SLACK = 0.02
"""Share of the limit that stays free for a file that is rewritten while the old one is still there, and for events; as
much again is freed beyond what is needed, so that files are not rewritten for every step."""

_SOFT_RING = 0.8
"""Share of its cap beyond which the oldest steps leave the ring, so that readers have time before they have to go."""

_BLOCK = 4096
"""A file takes whole blocks of the disk."""

_TIER_OF_LEVEL = {layout.RING: "ring", layout.PINNED: "pinned"}

PIN_AFTER = 8
"""Steps after a pin that are pinned too."""

Note = Callable[[str, str], None]


def tier_of(name: str) -> str:
    """The tier that a file of a run counts to."""
    table, _, rest = name.partition("/")
    level = rest.partition("/")[0]
    if level in _TIER_OF_LEVEL:
        return _TIER_OF_LEVEL[level]
    return "kept" if table == layout.TOKENS else "summary"


@dataclass
class _Tier:
    """Files of one tier, oldest first."""

    files: OrderedDict[str, int] = field(default_factory=OrderedDict)
    size: int = 0

    def add(self, name: str, size: int) -> None:
        self.remove(name)
        self.files[name] = _on_disk(size)
        self.size += self.files[name]

    def remove(self, name: str) -> None:
        self.size -= self.files.pop(name, 0)


class Retention:
    """Accounts for the files of one rank and removes what passes its share.

    Args:
        limit: bytes this rank may use; None = no limit.
        what: the token policy.
        note: receives an event, (kind, detail).
        grace: seconds for which a file of the ring stays after its time, for readers that hold its name.
    """

    def __init__(
        self,
        storage: Storage,
        rank: int,
        limit: int | None,
        what: TokenPolicy,
        note: Note,
        grace: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._storage, self._rank, self._what, self._note = storage, rank, what, note
        self._limit = float("inf") if limit is None else float(limit)
        self._tiers = {tier: _Tier() for tier in _CAPS}
        self._halved: dict[str, int] = {}
        self._said: set[str] = set()
        self._pin_until: tuple[int, int, str] | None = None
        self._grace = grace
        self._leaving: dict[str, float] = {}  # files of the ring whose time is over → when they go

    @property
    def used(self) -> int:
        """Bytes that this rank's files take."""
        return sum(tier.size for tier in self._tiers.values())

    def begin(self, files: Iterable[tuple[str, int]]) -> None:
        """Account for the files that are there now: other processes pin and compact them."""
        self._tiers = {tier: _Tier() for tier in _CAPS}
        for name, size in sorted(files, key=lambda f: f[0].rsplit("/", 1)[-1]):
            self._tiers[tier_of(name)].add(name, size)

    def is_tight(self, size: int) -> bool:
        """True if so many bytes more would pass the limit."""
        return self.used + _on_disk(size) > self._limit * (1 - _SLACK)

    def fits(self, name: str, size: int) -> bool:
        """True if a new file may be written, after other ones made room for it."""
        tier = tier_of(name)
        cap, size = self._cap(tier), _on_disk(size)
        if size > cap:
            base = name.rsplit("/", 1)[-1]
            self._say_once(tier, f"{base} of {size:,} bytes is larger than all that {tier} may use, {cap:,.0f}")
            return False
        if tier == "ring":
            self._leave_beyond(_SOFT_RING * cap - size)
            self._shorten_ring(cap - size)
        if self.is_tight(size):
            self.release()
        if self.is_tight(size):
            self._make_room(self._limit * (1 - 2 * _SLACK) - size)
        return self._tiers[tier].size + size <= cap and not self.is_tight(size)

    def _cap(self, tier: str) -> float:
        # steps that a user pinned from outside leave the ring with less
        over = max(0.0, self._tiers["pinned"].size - _CAPS["pinned"] * self._limit) if tier == "ring" else 0.0
        return _CAPS[tier] * self._limit - (over if self._limit < float("inf") else 0.0)

    def added(self, name: str, size: int) -> None:
        """Account for a new file."""
        self._tiers[tier_of(name)].add(name, size)

    def removed(self, name: str) -> None:
        """Account for a file that is gone."""
        self._tiers[tier_of(name)].remove(name)

    def expire_ring(self, newest: int) -> None:
        """Let go of the ring's steps that are more than `ring` steps old, and pin those that a pin still waits for."""
        if self._pin_until is not None:
            first, last, reason = self._pin_until
            self._pin([n for n in self._ring() if first <= (_step(n) or 0) <= last], reason)
            self._pin_until = self._pin_until if newest < last else None
        oldest = newest - self._what.ring + 1
        for name in [n for n in self._ring() if not oldest <= (_last_step(n) or 0) <= newest]:
            self._leave(name)
        self.release(time.monotonic())

    def release(self, until: float = float("inf")) -> None:
        """Remove the files of the ring whose time is over; without a bound also those that readers may hold."""
        for name in [n for n, goes in self._leaving.items() if goes <= until]:
            self._drop_of_ring(name)

    def _leave(self, name: str) -> None:
        self._leaving[name] = time.monotonic() + self._grace()
        table, _, base = name.split("/")
        if self._storage.local is not None:
            with contextlib.suppress(OSError):  # on a full disk it goes all the same
                self._storage.write(f"{table}/{layout.LEFT}/{base}", b"", fsync=False)

    def _leave_beyond(self, size: float) -> None:
        ring = self._ring()
        live = sum(self._tiers["ring"].files[name] for name in ring)
        for name in ring:
            if live <= size:
                return
            live -= self._tiers["ring"].files[name]
            self._leave(name)

    def _ring(self) -> list[str]:
        return [name for name in self._tiers["ring"].files if name not in self._leaving]

    def pin(self, reason: str, newest: int, after: int = PIN_AFTER) -> int:
        """Keep the steps of the ring and the next `after` steps; returns how many files were kept.

        A reason that comes again while steps are still being pinned only prolongs that.
        """
        goes_on = self._pin_until is not None and newest <= self._pin_until[1]
        self._pin_until = (newest + 1, newest + after, reason) if after else None
        kept = self._pin(self._ring(), reason)
        if kept and not goes_on:
            steps = [_step(name) or 0 for name in kept] + [_last_step(name) or 0 for name in kept]
            self._note("pinned", f"steps {min(steps)} to {max(steps)}: {reason}")
        return len(kept)

    def _pin(self, names: list[str], reason: str) -> list[str]:
        """Newest first, as long as there is room; what was pinned earlier stays: the first incident tells most."""
        tier, share = self._tiers["pinned"], _CAPS["pinned"] * self._limit
        kept: list[str] = []
        for name in reversed(names):
            size = self._tiers["ring"].files[name]
            if tier.size + size > share:
                self._say_once("pinned", f"not all steps of {reason!r} fit into {share:,.0f} bytes for pinned steps")
                break
            table, _, base = name.split("/")
            self._storage.copy(name, f"{table}/{layout.PINNED}/{base}")
            self._leaving[name] = time.monotonic() + self._grace()
            tier.add(f"{table}/{layout.PINNED}/{base}", size)
            kept.append(name)
        return kept

    def _make_room(self, target: float) -> None:
        """Bring all files together down to `target` bytes, taking nothing below a tier's floor."""
        floor = _FLOOR * self._limit

        def goal(tier: str) -> float:
            return max(floor, target - (self.used - self._tiers[tier].size))

        self._thin(goal("kept"))
        self._shorten_ring(goal("ring"))
        self._shorten_summary(goal("summary"))

    def _shorten_ring(self, size: float) -> None:
        ring = self._tiers["ring"]
        while ring.files and ring.size > size:
            self._drop_of_ring(next(iter(ring.files)))

    def _thin(self, size: float) -> None:
        """Halve the sample and the tails of the oldest steps, those first that were halved least; the newest last."""
        kept = self._tiers["kept"]
        if kept.size > size:
            self._say_once("kept", "the oldest steps keep half of their sample and tails from here on, again and again")
        while kept.size > size:
            # half of one block is still one block
            sealed = [n for n, taken in kept.files.items() if f"/{layout.SEALED}/" in n and taken > _BLOCK]
            if not sealed:
                return
            sealed.sort(key=lambda n: _step(n) or 0)
            name = min(sealed[:-1] or sealed, key=lambda n: self._halved.get(n, 0))
            self._rewrite(name, thinned)

    def _shorten_summary(self, size: float) -> None:
        """Remove the texts of the oldest steps, then the oldest steps themselves; coarser rollups stay."""
        summary = self._tiers["summary"]
        if summary.size > size:
            self._say_once("summary", "the oldest steps lose their texts, then their rows; the coarser rollups stay")
        for name in [n for n in summary.files if n.startswith(f"{layout.SEQUENCES}/{layout.SEALED}/")]:
            if summary.size <= size:
                return
            if not self._halved.get(name):
                self._rewrite(name, without_texts)
        sealed = [n for n in summary.files if n.startswith(f"{layout.ROLLUP}/{layout.SEALED}/")]
        # what was pinned is worth little without its steps
        for name in sorted(sealed, key=self._holds_pinned):
            if summary.size <= size:
                return
            self._give_up_until(name)
            self._drop(name)

    def _holds_pinned(self, name: str) -> bool:
        first, last = _step(name) or 0, _last_step(name) or 0
        return any(first <= (_step(n) or 0) <= last for n in self._tiers["pinned"].files)

    def _give_up_until(self, rollup: str) -> None:
        """Remove tokens and sequences of the steps whose rollup goes next."""
        first, last = _step(rollup) or 0, _last_step(rollup) or 0
        for tier in ("kept", "summary"):
            for name in list(self._tiers[tier].files):
                is_rollup = name.startswith(f"{layout.ROLLUP}/")
                held = first <= (_last_step(name) or 0) <= last
                if f"/{layout.SEALED}/" in name and not is_rollup and held:
                    self._drop(name)

    def _rewrite(self, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
        table, level, base = name.split("/")
        file = layout.parse_name(f"{table}/{level}", base)
        assert file is not None
        try:
            before = self._storage.read(name)
        except FileNotFoundError:  # compacted by another process
            return self._drop(name)
        if f"{zlib.crc32(before):08x}" != file.crc:  # damaged, which a new name would hide
            return self._drop(name)
        # written even without a row: a step whose file is gone is one whose tokens were lost
        data = encode(change(read_rows(before)), table)
        target = f"{table}/{level}/{layout.file_name(file.first, file.last, file.attempt, file.rank, data)}"
        self._halved[target] = self._halved.get(name, 0) + 1
        if target == name:  # nothing changed
            return
        self._shorten_ring(self._tiers["ring"].size + self._limit - self.used - _on_disk(data.size))
        self._storage.write(target, data, fsync=True)  # the file that it stands for goes next
        self.added(target, data.size)
        self._drop(name)

    def _drop(self, name: str) -> None:
        self._storage.delete(name)
        self.removed(name)

    def _drop_of_ring(self, name: str) -> None:
        size, pinned = self._tiers["ring"].files.get(name, 0), name.replace(f"/{layout.RING}/", f"/{layout.PINNED}/")
        self._leaving.pop(name, None)
        self._drop(name)
        self._storage.delete(name.replace(f"/{layout.RING}/", f"/{layout.LEFT}/"))
        if self._storage.local is not None and self._storage.exists(pinned):
            # another process has pinned it
            self._tiers["pinned"].add(pinned, size)

    def _say_once(self, tier: str, detail: str) -> None:
        if tier not in self._said:
            self._said.add(tier)
            with contextlib.suppress(OSError):
                self._note("disk_limit", detail)


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _step(name: str) -> int | None:
    found = layout.parse_name("", name.rsplit("/", 1)[-1])
    return found.first if found else None


def _last_step(name: str) -> int | None:
    found = layout.parse_name("", name.rsplit("/", 1)[-1])
    return found.last if found else None


def thinned(rows: pa.Table) -> pa.Table:
    """Half of each step's sampled sequences, and the more extreme half of its tails.

    Which sequences stay depends on their ids alone, so the sample stays uniform however often it is halved. Rows of a
    run that kept all tokens become a sample.
    """
    reason = np.asarray(rows["kept_because"].to_pylist(), dtype=object)
    step = rows["step"].to_numpy()
    keep = np.zeros(len(rows), bool)
    whole = np.isin(reason, ["sample", "all"])
    if whole.any():
        ids = rows["sequence_id"].to_numpy()
        pairs, place = np.unique(np.stack([step[whole], ids[whole]]), axis=1, return_inverse=True)
        keep[whole] = _first_half(pairs[0], sequence_hash(pairs[1]).astype(np.float64))[place.reshape(-1)]
    log_ratio = rows["log_ratio"]
    if log_ratio.null_count:  # a store of minimal columns
        log_ratio = pc.subtract(rows["logp_new"], rows["logp_old"])
    shift = log_ratio.to_numpy(zero_copy_only=False).astype(np.float64)
    for name, order in (("low tail", shift), ("high tail", -shift), ("non-finite", np.zeros(len(shift)))):
        here = reason == name
        keep[here] = _first_half(step[here], order[here])
    rows = rows.filter(pa.array(keep))
    now = pc.if_else(pc.equal(rows["kept_because"], "all"), "sample", rows["kept_because"])
    return rows.set_column(rows.schema.get_field_index("kept_because"), "kept_because", now)


def _first_half(group: np.ndarray, order: np.ndarray) -> np.ndarray:
    """True for the first half, rounded down, of each group in rising order."""
    by_order = np.lexsort((order, group))
    sorted_group = group[by_order]
    starts = np.flatnonzero(np.r_[True, sorted_group[1:] != sorted_group[:-1]]) if len(group) else np.empty(0, int)
    sizes = np.diff(np.r_[starts, len(group)])
    rank = np.arange(len(group)) - np.repeat(starts, sizes)
    found = np.zeros(len(group), bool)
    found[by_order] = rank < np.repeat(sizes // 2, sizes)
    return found


def without_texts(rows: pa.Table) -> pa.Table:
    """The sequences without prompt, completion and what else a trainer said of them."""
    for name in ("prompt", "completion", "extra"):
        index = rows.schema.get_field_index(name)
        rows = rows.set_column(index, rows.schema.field(index), pa.nulls(len(rows), rows.schema.field(index).type))
    return rows


def pin_ring(storage: Storage) -> list[StepFile]:
    """Keep all steps of the ring of every rank for good; any process may ask, whether or not the run has a writer."""
    pinned = []
    left = layout.list_left(storage)
    # a step whose summary is not there yet may never get one
    rollup = layout.list_table(storage, layout.ROLLUP)
    for table in (layout.TOKENS, layout.SEQUENCES):
        for file in layout.list_ring(storage, table, rollup, left)[layout.RING]:
            storage.copy(file.name, f"{table}/{layout.PINNED}/{file.base}")
            pinned.append(file)
    return pinned
