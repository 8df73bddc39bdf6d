"""Every objective once more, as naively as its paper writes it: plain exp, min and clamp, the slope left to autograd.

Shape letters: B sequences, T response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softplus

from mhpo_core import TokenBatch


@dataclass
class Naive:
    """The trained tokens of a batch; masked positions hold log-probability 0, ratio 1 and advantage 0."""

    logp: Tensor
    old: Tensor
    rollout: Tensor
    advantage: Tensor
    mask: Tensor

    @staticmethod
    def of(batch: TokenBatch) -> Naive:
        def clean(values):
            return torch.where(batch.mask, values.detach(), 0.0)

        leaf = clean(batch.logp_new).requires_grad_()
        return Naive(leaf, clean(batch.logp_old), clean(batch.logp_rollout), clean(batch.advantage), batch.mask)

    @property
    def log_ratio(self) -> Tensor:
        return self.logp - self.old

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.exp()

    def per_sequence(self, values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """reduce(trained values of the sequence) at each of its positions."""
        rows = [reduce(v[m]) if m.any() else v.sum() * 0 for v, m in zip(values, self.mask, strict=True)]
        return torch.stack(rows)[:, None].expand_as(values)


def clip(t, eps_low, eps_high, ratio=None):
    ratio = t.ratio if ratio is None else ratio
    return torch.minimum(ratio * t.advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * t.advantage)


def dual_clip(t, eps_low, eps_high, dual_c):
    bounded = clip(t, eps_low, eps_high)
    return torch.where(t.advantage < 0, torch.maximum(bounded, dual_c * t.advantage), bounded)


def two_sided(t, eps_low, eps_high, delta):
    capped = t.ratio.clamp(max=delta)
    return torch.minimum(capped * t.advantage, t.ratio.clamp(1 - eps_low, 1 + eps_high) * t.advantage)


def score(t, weight):
    return weight.detach() * t.advantage * t.logp


def cispo(t, ratio_min, ratio_max):
    return score(t, t.ratio.clamp(ratio_min, ratio_max))


def tis(t, ratio_min, ratio_max):
    return score(t, t.ratio.clamp(ratio_min or 0, ratio_max))


def inside(ratio, low, high):
    return ((ratio >= (low or 0)) & (ratio <= high)).double()


def mis(t, ratio_min, ratio_max):
    return score(t, t.ratio * inside(t.ratio, ratio_min, ratio_max))


def topr(t, pos_clip, neg_clip):
    return score(t, torch.where(t.advantage > 0, t.ratio.clamp(*pos_clip), t.ratio.clamp(*neg_clip)))


def sapo(t, tau_pos, tau_neg):
    tau = torch.where(
        t.advantage > 0, torch.tensor(tau_pos, dtype=torch.float64), torch.tensor(tau_neg, dtype=torch.float64)
    )
    return torch.sigmoid(tau * (t.ratio - 1)) * 4 / tau * t.advantage


def dppo_tv(t, delta_low, delta_high, ratio_cap):
    change = t.logp.exp() - t.old.exp()
    kept = torch.where(t.advantage > 0, change <= delta_high, change >= -delta_low)
    return score(t, t.ratio.clamp(max=ratio_cap) * kept)


def dppo_kl(t, delta_low, delta_high, ratio_cap):
    p, q = t.old.exp(), t.logp.exp()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    back = torch.where(t.advantage > 0, q <= p, q >= p)
    kept = back | torch.where(t.advantage > 0, divergence <= delta_high, divergence <= delta_low)
    return score(t, t.ratio.clamp(max=ratio_cap) * kept)


def mhpo(t, c, k_pos, lambda_pos, k_neg, lambda_neg, lfm=True, dhp=True, stop_grad=True):
    psi = c * torch.tanh(t.log_ratio / c) if lfm else t.log_ratio
    shift = psi.detach() if stop_grad else psi
    hazard = (softplus(shift) / lambda_pos) ** k_pos + (softplus(-shift) / lambda_neg) ** k_neg
    return torch.exp(psi - hazard if dhp else psi) * t.advantage


def mhpo_sign_aware(t, c, k_pos, lambda_pos, k_neg, lambda_neg):
    psi, ln2 = c * torch.tanh(t.log_ratio / c), torch.tensor(2.0, dtype=torch.float64).log()
    weight = torch.exp(psi - (ln2 / lambda_pos) ** k_pos - (ln2 / lambda_neg) ** k_neg).detach()
    corrective = weight * torch.exp(t.logp - t.logp.detach()) * t.advantage
    outward = mhpo(t, c, k_pos, lambda_pos, k_neg, lambda_neg)
    return torch.where(t.advantage * t.log_ratio < 0, corrective, outward)


def gspo(t, eps_low, eps_high):
    return clip(t, eps_low, eps_high, t.per_sequence(t.log_ratio, torch.mean).exp())


def gmpo(t, eps_low, eps_high):
    x = t.log_ratio
    bounded = torch.where(
        t.advantage > 0, x.clamp(max=eps_high), torch.where(t.advantage < 0, x.clamp(min=-eps_low), x)
    )
    return t.per_sequence(bounded, torch.mean).exp() * t.advantage


def sequence_ratio(t):
    return t.per_sequence(t.ratio, torch.prod)


def vespo(t, k_pos, lambda_pos, k_neg, lambda_neg):
    w = sequence_ratio(t)
    positive = torch.exp(torch.tensor(lambda_pos, dtype=torch.float64)) * w**k_pos * torch.exp(-lambda_pos * w)
    negative = torch.exp(torch.tensor(lambda_neg, dtype=torch.float64)) * w**k_neg * torch.exp(-lambda_neg * w)
    return score(t, torch.where(t.advantage >= 0, positive, negative))


def seq_tis(t, ratio_max):
    return score(t, sequence_ratio(t).clamp(max=ratio_max))


def seq_mis(t, ratio_min, ratio_max):
    w = sequence_ratio(t)
    return score(t, w * inside(w, ratio_min, ratio_max))


def geo_mis(t, ratio_min, ratio_max):
    return score(t, inside(t.per_sequence(t.log_ratio, torch.mean).exp(), ratio_min, ratio_max))


def opsm(t, base, kl_threshold):
    kl = t.per_sequence(-t.log_ratio, torch.mean)
    return inner(t, base) * ~((t.advantage < 0) & (kl > kl_threshold))


def trm_max_k2(t, base, threshold):
    largest = t.per_sequence(t.log_ratio**2 / 2, torch.max)
    return inner(t, base) * (largest <= threshold)


def trm_mean_k3(t, base, threshold):
    mean = t.per_sequence(t.ratio - 1 - t.log_ratio, torch.mean)
    return inner(t, base) * (mean <= threshold)


def decoupled(t, base, mode, clip_max, clip_min):
    rho = (t.old - t.rollout).exp()
    level, _, kind = mode.partition("_")
    rho = t.per_sequence(rho, torch.prod) if level == "sequence" else rho
    weight = {
        "truncate": rho.clamp(max=clip_max),
        "mask": rho * (rho <= clip_max),
        "mask_two_sided": rho * inside(rho, clip_min, clip_max),
    }[kind]
    return inner(t, base) * weight


def inner(t, objective) -> Tensor:
    """The surrogate of an objective inside another one."""
    return TWINS[objective.name][0](t, **{f.name: getattr(objective, f.name) for f in fields(objective)})


BAND = {"eps_low": st.floats(0, 1.5), "eps_high": st.floats(0, 3)}
MHPO = {name: st.floats(0.3, 3) for name in ("c", "k_pos", "lambda_pos", "k_neg", "lambda_neg")}
RANGE = {"ratio_min": st.floats(-1, 0.9), "ratio_max": st.floats(1.1, 4)}
PAIR = st.tuples(st.floats(0, 0.9), st.floats(1, 3))
# at a delta of 0 the naive divergence is decided by its rounding error
DELTAS = {"delta_low": st.floats(0.001, 0.5), "delta_high": st.floats(0.001, 0.5), "ratio_cap": st.floats(0.5, 20)}
TEMPERATURES = {"tau_pos": st.floats(0.1, 3), "tau_neg": st.floats(0.1, 3)}
SHAPES = {name: st.floats(0.3, 3) for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
THRESHOLD = st.floats(0.05, 1)

DECOUPLED_MODES = [
    f"{level}_{kind}" for level in ("token", "sequence") for kind in ("truncate", "mask", "mask_two_sided")
]

# name → (surrogate as the paper writes it, legal hyperparameters); wrappers keep their default base
TWINS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "mhpo": (mhpo, MHPO),
    "mhpo_lfm_only": (mhpo, {**MHPO, "dhp": st.just(False)}),
    "mhpo_dhp_only": (mhpo, {**MHPO, "lfm": st.just(False)}),
    "mhpo_no_stopgrad": (mhpo, {**MHPO, "stop_grad": st.just(False)}),
    "mhpo_sa": (mhpo_sign_aware, MHPO),
    "ppo_clip": (clip, BAND),
    "dapo_clip": (clip, BAND),
    "dual_clip": (dual_clip, {**BAND, "dual_c": st.floats(1.1, 5)}),
    "two_sided_clip": (two_sided, {**BAND, "delta": st.floats(0.3, 8)}),
    "is_pg": (lambda t: t.ratio * t.advantage, {}),
    "reinforce": (lambda t: t.advantage * t.logp, {}),
    "cispo": (cispo, RANGE),
    "cispo_verl": (cispo, RANGE),
    "sapo": (sapo, TEMPERATURES),
    "topr": (topr, {"pos_clip": PAIR, "neg_clip": PAIR}),
    "tis": (tis, RANGE),
    "mis": (mis, RANGE),
    "icepop": (mis, RANGE),
    "dppo_tv": (dppo_tv, DELTAS),
    "dppo_kl": (dppo_kl, DELTAS),
    "gspo": (gspo, BAND),
    "luspo": (gspo, BAND),
    "gmpo": (gmpo, {"eps_low": st.floats(0, 2), "eps_high": st.floats(0, 2)}),
    "vespo": (vespo, SHAPES),
    "seq_tis": (
        lambda t, ratio_max: score(t, sequence_ratio(t).clamp(max=ratio_max)),
        {"ratio_max": st.floats(0.5, 4)},
    ),
    "seq_mis": (seq_mis, RANGE),
    "geo_mis": (geo_mis, RANGE),
    "opsm_ppo": (opsm, {"kl_threshold": THRESHOLD}),
    "trm_max_k2": (trm_max_k2, {"threshold": THRESHOLD}),
    "trm_mean_k3": (trm_mean_k3, {"threshold": THRESHOLD}),
    "decoupled": (
        decoupled,
        {
            "mode": st.sampled_from(DECOUPLED_MODES),
            "clip_max": st.floats(1, 3),
            "clip_min": st.floats(0, 0.99),
        },
    ),
}
