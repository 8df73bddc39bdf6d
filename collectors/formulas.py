"""What follows from a token's stored columns: the same quantities as `Objective.terms`, which tests compare.

The formulas come in stages, each over the columns of the one before, so that a tanh or exp that several columns need is
computed once and a query over them is planned in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from collectors.expressions import (
    Expression,
    absolute,
    as_float,
    atanh,
    coalesce,
    column,
    double,
    exp,
    is_infinite,
    is_zero,
    ln,
    power,
    sign,
    tanh,
    where,
)
from collectors.token_rows import COMPACT, MINIMAL

Stage = dict[str, Expression]
"""Column → its formula over the columns there are so far; it takes the place of one of the same name."""

# without the modulator, shift and hazard of an infinite ratio differ by more than their float32 columns can say
_MULTIPLIERS = ("mhpo", "mhpo_lfm_only")
_WITH_MODULATOR = ("mhpo", "mhpo_lfm_only", "mhpo_no_stopgrad", "mhpo_sa")
_WITHOUT_MODULATOR = ("mhpo_dhp_only",)
_NO_HAZARD = ("mhpo_lfm_only",)

DERIVED = ("modulated_log_ratio", "hazard_positive", "hazard_negative", "survival_weight", "gradient_multiplier")


@dataclass(frozen=True)
class Derivation:
    """How columns of a token follow from others.

    Args:
        stages: helper columns, over the stored columns and the helpers of earlier stages.
        columns: column of DERIVED → float64 over stored columns and helpers; a column that does not follow is absent.
        hazard: ζ, where the run does not store it; None where it does not follow.
    """

    stages: tuple[Stage, ...] = ()
    columns: Stage = field(default_factory=dict)
    hazard: Expression | None = None


def token_stages(manifest: Mapping[str, Any]) -> list[Stage]:
    """What the view `tokens` computes for the tokens of a run, from the columns that its files have.

    Args:
        manifest: contents of run.json.
    """
    store, found = manifest.get("store") or {}, derivation(manifest.get("objective") or {})
    stages = [_not_stored(store), *found.stages]
    if found.hazard and store.get("columns") == MINIMAL:
        stages.append({"hazard": coalesce(column("hazard"), as_float(found.hazard))})
    if "gradient_multiplier" in found.columns:
        stages.append({"_multiplier": found.columns["gradient_multiplier"]})
        stages.append({"gradient_multiplier": as_float(column("_multiplier"))})
    others = {name: as_float(value) for name, value in found.columns.items() if name != "gradient_multiplier"}
    return [*stages, *_norm(others)]


def _not_stored(store: Mapping[str, Any]) -> Stage:
    """The sums and differences that the run's settings leave to be computed."""
    new, old, ratio = column("logp_new"), column("logp_old"), column("log_ratio")
    if store.get("precision") == COMPACT:
        return {"logp_new": old + ratio, "logp_rollout": old - column("mismatch")}
    if store.get("columns") == MINIMAL:
        return {"log_ratio": new - old}
    return {"logp_new": coalesce(new, old + ratio)}


def _norm(others: Stage) -> list[Stage]:
    """|A·M|·(1 − p), the token gradient norm where neither it nor Σp² was stored; other columns in its last stage."""
    half, weight = column("_half"), column("_weight")
    # 1 − p by way of tanh keeps its digits for p near 1, and is 0 for p above 1
    miss = where(half < 0, 0, 2 * half / (1 + half))
    product = as_float(where(is_zero(weight), 0, weight * column("_miss")))
    return [
        {
            "_half": tanh(-double("logp_new") / 2),
            "_weight": absolute(double("advantage") * column("gradient_multiplier")),
        },
        {"_miss": miss},
        others | {"logit_grad_norm": coalesce(column("logit_grad_norm"), product)},
    ]


def derivation(objective: Mapping[str, Any]) -> Derivation:
    """What follows for the tokens of a run of this objective.

    Args:
        objective: name and hyperparameters, as run.json has them.
    """
    given = objective.get("hyperparameters") or {}
    if isinstance(given.get("base"), dict):
        # an objective around another one: its terms are the inner one's, its multiplier is its own
        inner = derivation({"name": given["base"].get("name"), "hyperparameters": given["base"]})
        columns = {name: value for name, value in inner.columns.items() if name != "gradient_multiplier"}
        return Derivation(inner.stages, columns, inner.hazard)
    name = str(objective.get("name"))
    numbers = {k: float(v) for k, v in given.items() if _is_number(v)}
    try:
        return _mhpo(name, numbers) if name in _WITH_MODULATOR + _WITHOUT_MODULATOR else Derivation()
    except KeyError:  # an imported run may not say with which hyperparameters it was made
        return Derivation()


def _mhpo(name: str, numbers: Mapping[str, float]) -> Derivation:
    ratio, psi, shift, decay = double("log_ratio"), column("_psi"), column("_shift"), column("_decay")
    stages: list[Stage] = [{"_psi": _shift_of(name, ratio, numbers)}]
    columns = {"modulated_log_ratio": psi}
    exponent = psi
    if name not in _NO_HAZARD:
        pulls_back = double("advantage") * column("log_ratio") < 0
        stages += [
            {"_shift": where(pulls_back, 0, psi) if name == "mhpo_sa" else psi},
            {"_decay": exp(-absolute(shift))},
            # log(1 + e^−|x|): 2·atanh(y / (2 + y)) is log(1 + y) with the digits of a small y
            {"_tail": 2 * atanh(decay / (2 + decay))},
            {
                "_positive": _hazard(shift, numbers["lambda_pos"], numbers["k_pos"]),
                "_negative": _hazard(-shift, numbers["lambda_neg"], numbers["k_neg"]),
            },
        ]
        columns |= {
            "hazard_positive": column("_positive"), "hazard_negative": column("_negative"),
            "survival_weight": exp(-double("hazard")),
        }  # fmt: skip
        exponent = exponent - double("hazard")
    if name in _MULTIPLIERS:
        # log sech²(x) in a form that keeps its digits for large x
        twice = column("_double")
        stages += [{"_double": 2 * absolute(ratio / numbers["c"])}]
        columns["gradient_multiplier"] = exp(exponent + ln(4) - twice - 2 * ln(1 + exp(-twice)))
    hazard = column("_positive") + column("_negative") if name not in _NO_HAZARD else None
    return Derivation(tuple(stages), columns, hazard)


def _shift_of(name: str, ratio: Expression, numbers: Mapping[str, float]) -> Expression:
    if name in _WITHOUT_MODULATOR:
        # an infinite shift would be Inf − Inf in the weight
        return where(is_infinite(column("log_ratio")), sign(column("log_ratio")) * 1e77, ratio)
    return numbers["c"] * tanh(ratio / numbers["c"])


def _hazard(shift: Expression, scale: float, exponent: float) -> Expression:
    """(softplus(shift) / scale)^exponent"""
    return power((where(shift < 0, 0, shift) + column("_tail")) / scale, exponent)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
