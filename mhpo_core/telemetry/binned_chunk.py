"""Two passes over about a million tokens: their log-ratios, then what is weighted by the multipliers these lead to.

Shape letters: R rows and C tokens of a block, K filled bins of log_ratio.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mhpo_core.batch import TokenBatch
from mhpo_core.objectives import Objective, Tokens
from mhpo_core.objectives.tokens import LARGEST_EXPONENT
from mhpo_core.telemetry.accumulators import ADVANTAGE_UNIT
from mhpo_core.telemetry.fine_bins import COARSE, FINE, Filled, Floats, Quantity, SideSums
from mhpo_core.telemetry.one_pass import IMPOSSIBLE
from mhpo_core.telemetry.panels import CODES, Block, Buffers, Panel, Values

# Bins from here on get their mean: few tokens lie there, each weighs much in an exponential, and the bins are wide.
_FAR = 1.0
# With no more tokens than this every bin gets its mean, because the errors of single bins do not average out.
_FEW = 1 << 16
_LARGEST_ADVANTAGE = 2.0**18
_LARGEST_VALUE = {"logp_new": IMPOSSIBLE, "sum_p_squared": 1 + IMPOSSIBLE}
_LARGEST_SINGLE = float(np.finfo(np.float32).max)
_SIGNS = np.array([1.0, -1.0, 0.0, math.nan])

Codes = NDArray[np.int32]


@dataclass(frozen=True)
class Measured:
    """What the passes leave of a chunk.

    Args:
        sums: of log_ratio and logit_grad_norm, and of mismatch_log_ratio and entropy where they are there.
        filled: their bins. Weight is Σ|A·M|, but for log_ratio Σ|A| in ADVANTAGE_UNIT.
        terms: fields of Terms at the value of each bin of log_ratio, (K,) float64 or bool.
        weight: (K,) Σ|A·M| of these bins.
        counts: by metric name.
    """

    sums: dict[str, SideSums]
    filled: dict[str, Filled]
    terms: dict[str, NDArray[Any]]
    weight: Floats
    counts: dict[str, int]


def measure_chunk(
    panels: list[Panel], objective: Objective, dtype: torch.dtype, wanted: Collection[str], buffers: Buffers
) -> Measured:
    """Both passes over tokens on the CPU.

    Args:
        objective: one whose terms follow from the ratio.
        dtype: of the terms, float32 or float64.
        wanted: quantities beside log_ratio.
    """
    chunk = _Chunk(panels, wanted, buffers)
    ratio, code = chunk.first_pass()
    terms = _terms_at(ratio, objective, dtype)
    weights = _Weights(ratio, np.abs(terms["gradient_multiplier"]), chunk)
    chunk.second_pass(weights, code)
    sums = {name: quantity.by_side() for name, quantity in chunk.quantities.items()}
    filled = {name: ratio if name == "log_ratio" else q.filled() for name, q in chunk.quantities.items()}
    counts = chunk.counts(sums, filled, LARGEST_EXPONENT[dtype])
    return Measured(sums, filled, terms, weights.of_bins(ratio), counts)


class _Chunk:
    def __init__(self, panels: list[Panel], wanted: Collection[str], buffers: Buffers) -> None:
        self.panels, self.buffers = panels, buffers
        present = panels[0].fields
        needed = {"mismatch_log_ratio": "logp_rollout", "entropy": "entropy", "logit_grad_norm": "logp_new"}
        self.wanted = [name for name, field in needed.items() if name in wanted and field in present]
        self.n_tokens = sum(int(np.count_nonzero(p.mask)) for p in panels)
        self.n_sides = 1 + max(int(p.side.max()) for p in panels)
        self.quantities: dict[str, Quantity] = {}
        # whether what is rare can be there at all; only then it is counted
        self.all_finite = all(bool(np.isfinite(p.size).all()) for p in panels)
        self.all_possible = True

    def first_pass(self) -> tuple[Filled, Codes]:
        """Bins of log_ratio, and the place of each token in its table, block after block."""
        units = [np.rint(np.minimum(np.nan_to_num(p.size), _LARGEST_ADVANTAGE) / ADVANTAGE_UNIT) for p in self.panels]
        bits = int(sum(p.total(u) for u, p in zip(units, self.panels, strict=True))).bit_length()
        n_places = sum(p.mask.size for p in self.panels)
        # count and weight share 63 bits; weights that do not fit lose their last ones
        lost = max(0, bits + n_places.bit_length() - 63)
        quantity = self._open("log_ratio", FINE, 1 << (bits - lost))
        code, done = self.buffers.get("codes", n_places, np.int32), 0
        for panel, own in zip(self.panels, units, strict=True):
            packed_rows = (own.astype(np.int64) >> lost) + quantity.unit
            for block in panel.blocks(self.buffers):
                here = code[done : done + block.mask.size].reshape(block.mask.shape)
                done += here.size
                packed = block.buffer("packed", np.int64)
                np.copyto(packed, block.part(packed_rows))
                quantity.add_exactly(block, block.difference("logp_new", "logp_old"), packed, here)
                self._look(block, ("logp_new",) if self.wanted else tuple(panel.fields))
        ratio = quantity.filled()
        return replace(ratio, weight=ratio.weight * 2.0**lost), code

    def second_pass(self, weights: _Weights, code: Codes) -> None:
        """The other quantities, with the weights of the tokens."""
        for name in (*self.wanted, "logit_grad_norm"):
            self._open(name, COARSE if name == "entropy" else FINE, weights.unit)
        done = 0
        for panel in self.panels if self.wanted else []:
            size = panel.size.astype(np.float32)
            others = tuple(set(panel.fields) - {"logp_new", "logp_old"})
            for block in panel.blocks(self.buffers):
                here = code[done : done + block.mask.size].reshape(block.mask.shape)
                done += here.size
                weight, packed = weights.of(block, block.part(size), here)
                for name in self.wanted:
                    self.quantities[name].add(block, _values(name, block, weight), packed)
                self._look(block, others)

    def _open(self, name: str, shift: int, unit: float) -> Quantity:
        n_sides = self.n_sides if name == "log_ratio" or name in self.wanted else 1
        table = self.buffers.get(name, n_sides * CODES, np.int64 if isinstance(unit, int) else np.float64)
        refine_from = 0.0 if self.n_tokens <= _FEW else _FAR
        self.quantities[name] = Quantity(table, shift, unit, refine_from if shift == FINE else np.inf)
        return self.quantities[name]

    def _look(self, block: Block, names: Collection[str]) -> None:
        """Whether a field holds anything non-finite or impossible, masked places included."""
        for name in names:
            values = block.get(name)
            if name in _LARGEST_VALUE:
                self.all_possible &= bool(np.fmax.reduce(values, axis=None) <= _LARGEST_VALUE[name])
            elif name == "entropy":
                self.all_possible &= bool(np.fmin.reduce(values, axis=None) >= -IMPOSSIBLE)
            elif name == "logp_ref" or (name == "logp_rollout" and "mismatch_log_ratio" not in self.wanted):
                self.all_finite &= math.isfinite(values.sum(dtype=np.float64))

    def counts(self, sums: dict[str, SideSums], filled: dict[str, Filled], limit: float) -> dict[str, int]:
        """Numbers of tokens by metric name; `limit` is the largest log-ratio whose exponential fits."""
        differences = [filled[name] for name in ("log_ratio", "mismatch_log_ratio") if name in filled]
        finite = self.all_finite and all(int(f.numbers[:, 0].sum()) == self.n_tokens for f in differences)
        clamped = sums["log_ratio"].high.max() > limit
        exact = "logit_grad_norm" in self.wanted and "sum_p_squared" in self.panels[0].fields
        return {
            "n_tokens": self.n_tokens,
            "logit_grad_norm_exact_count": self.n_tokens if exact else 0,
            "nonfinite_count": 0 if finite else sum(map(_nonfinite, self.panels)),
            "clamped_count": sum(_clamped(p, limit) for p in self.panels) if clamped else 0,
            "impossible_count": 0 if self.all_possible else sum(map(_impossible, self.panels)),
        }


class _Weights:
    """|A·M| of the tokens, with M looked up by the bin of the log-ratio.

    Attributes:
        unit: a power of two above the sum of all of them.
    """

    def __init__(self, ratio: Filled, multiplier: Floats, chunk: _Chunk) -> None:
        # a larger one would be infinite in float32, and NaN times A = 0
        multiplier = np.where(np.isfinite(multiplier), np.minimum(multiplier, _LARGEST_SINGLE), multiplier)
        known = np.where(np.isfinite(multiplier), multiplier, 0.0)
        self._of_bins = ratio.weight * ADVANTAGE_UNIT * known
        # the weights of `ratio` have |A| capped
        sizes = [np.where(np.isfinite(p.size), p.size, 0.0) for p in chunk.panels]
        above = [p.total(np.where(s > _LARGEST_ADVANTAGE, s, 0.0)) for s, p in zip(sizes, chunk.panels, strict=True)]
        largest = float(known.max(initial=0.0))
        self.unit = 2.0 ** (1 + math.frexp(float(self._of_bins.sum()) + sum(above) * largest)[1])
        fits = largest * max(float(s.max()) for s in sizes) < _LARGEST_SINGLE and not any(above)
        self._plain = fits and chunk.all_finite and bool(np.isfinite(multiplier).all())
        self._summed = np.zeros(0 if self._plain else chunk.n_sides * CODES)
        self._table = chunk.buffers.get("multiplier", chunk.n_sides * CODES, np.float32)
        # masked tokens look up the last bin of a side, which stays 0
        self._table[ratio.key] = multiplier

    def of(self, block: Block, size: Values, code: Codes) -> tuple[Values, Floats]:
        """|A·M|, (R, C) float32, 0 where masked; and `unit` plus it, or plus 0 where it is not finite."""
        weight, packed = block.buffer("weight", np.float32), block.buffer("packed", np.float64)
        index = block.buffer("index", np.int64)
        np.copyto(index, code)
        np.take(self._table, index, out=weight, mode="wrap")
        found = torch.from_numpy(weight)
        torch.mul(found, torch.from_numpy(size), out=found)
        np.copyto(packed, weight)
        if not self._plain:
            np.nan_to_num(packed, copy=False, nan=0.0, posinf=0.0)
            np.add.at(self._summed, index, packed)
        packed += self.unit
        return weight, packed

    def of_bins(self, ratio: Filled) -> Floats:
        """(K,) Σ|A·M| of the bins of log_ratio."""
        return self._of_bins if self._plain else self._summed[ratio.key]


def _values(name: str, block: Block, weight: Values) -> Values:
    """(R, C) of a quantity, in memory that may be overwritten; anything where masked."""
    if name == "mismatch_log_ratio":
        return block.difference("logp_old", "logp_rollout")
    if name == "entropy":
        given = block.get("entropy")
        entropy: Values = block.buffer("values", given.dtype.type)
        np.copyto(entropy, given)
        return entropy
    return _norm(block, weight)


def _norm(block: Block, weight: Values) -> Values:
    """(R, C) `logit_gradient_norm`."""
    out, zeros = block.buffer("values", np.float32), block.zeros()
    np.expm1(block.get("logp_new"), out=out, casting="same_kind")
    rest = block.buffer("rest", np.float32)
    np.add(out, np.float32(1), out=rest)
    # a log-probability a rounding error above 0 is a probability of 1
    np.minimum(out, zeros, out=out)
    if block.has("sum_p_squared"):
        np.square(rest, out=rest)
        np.subtract(block.get("sum_p_squared"), rest, out=rest, casting="same_kind")
        np.maximum(rest, zeros, out=rest)
        np.square(out, out=out)
        np.minimum(rest, out, out=rest)
        np.add(out, rest, out=out)
        np.sqrt(out, out=out)
    else:
        np.negative(out, out=out)
    np.multiply(out, weight, out=out)
    # without a weight there is no gradient, whatever the probabilities are
    if math.isnan(float(torch.from_numpy(out).sum())):
        out[weight == 0] = 0
    return out


def _terms_at(ratio: Filled, objective: Objective, dtype: torch.dtype) -> dict[str, NDArray[Any]]:
    """Fields of Terms at the value of each bin, (K,) float64 or bool."""
    n = len(ratio.key)
    # a batch needs a token, also where every log-ratio is NaN
    new = torch.from_numpy(np.append(ratio.value, 0.0)).to(dtype)[None]
    advantage = torch.from_numpy(_SIGNS[np.append(ratio.side, 0)]).to(dtype)[None]
    batch = TokenBatch(new, torch.zeros_like(new), advantage, torch.ones_like(new, dtype=torch.bool))
    terms = objective.rounded_terms(Tokens.of(batch, dtype))
    present = {f.name: getattr(terms, f.name) for f in fields(terms)} | {"hazard": terms.hazard}
    return {
        name: (values.double() if values.is_floating_point() else values)[0, :n].numpy()
        for name, values in present.items()
        if values is not None
    }


def _nonfinite(panel: Panel) -> int:
    known = panel.fields
    bad = ~np.isfinite(panel.size) | ~np.isfinite(known["logp_new"] - known["logp_old"])
    bad |= ~np.isfinite(known["logp_new"])
    if "logp_rollout" in known:
        bad |= ~np.isfinite(known["logp_old"].astype(np.float64) - known["logp_rollout"])
    if "logp_ref" in known:
        bad |= ~np.isfinite(known["logp_ref"])
    return int(np.count_nonzero(bad & panel.mask))


def _clamped(panel: Panel, limit: float) -> int:
    log_ratio = panel.fields["logp_new"].astype(np.float64) - panel.fields["logp_old"]
    return int(np.count_nonzero((log_ratio > limit) & panel.mask))


def _impossible(panel: Panel) -> int:
    impossible = panel.fields["logp_new"] > IMPOSSIBLE
    if "entropy" in panel.fields:
        impossible |= panel.fields["entropy"] < -IMPOSSIBLE
    if "sum_p_squared" in panel.fields:
        impossible |= panel.fields["sum_p_squared"] > 1 + IMPOSSIBLE
    return int(np.count_nonzero(impossible & panel.mask))
