"""What follows from a token's stored columns, as SQL: the same quantities as `Objective.terms`, which tests compare.

The formulas come in stages, each over the columns of the one before, so that a tanh or exp that several columns need is
computed once and a query over them is planned in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_LFM = "{c} * tanh(log_ratio::DOUBLE / {c})"
# an infinite shift would be Inf − Inf in the weight
_BOUNDED = "CASE WHEN isinf(log_ratio) THEN sign(log_ratio) * 1e77::DOUBLE ELSE log_ratio::DOUBLE END"
_PULLS_BACK = "advantage::DOUBLE * log_ratio < 0"
_LARGEST = "3.4028234663852886e38::DOUBLE"

_MODULATED = {
    "mhpo": _LFM, "mhpo_lfm_only": _LFM, "mhpo_no_stopgrad": _LFM, "mhpo_sa": _LFM,
    "mhpo_dhp_only": _BOUNDED,
}  # fmt: skip
_NO_HAZARD = ("mhpo_lfm_only",)
# without the modulator, shift and hazard of an infinite ratio differ by more than their float32 columns can say
_MULTIPLIERS = ("mhpo", "mhpo_lfm_only")

DERIVED = ("modulated_log_ratio", "hazard_positive", "hazard_negative", "survival_weight", "gradient_multiplier")


@dataclass(frozen=True)
class Derivation:
    """How columns of a token follow from others.

    Args:
        stages: helper column → SQL over the stored columns and the helpers of earlier stages.
        columns: column of DERIVED → SQL over stored columns and helpers; a column that does not follow is absent.
        hazard: SQL of ζ, where the run does not store it; empty where it does not follow.
    """

    stages: tuple[dict[str, str], ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    hazard: str = ""


def as_float(sql: str) -> str:
    """The DOUBLE as FLOAT; a finite value beyond its range becomes its largest one, as in `Objective.terms`.

    A plain cast of such a value fails, and with it the query.
    """
    return f"(CASE WHEN isfinite({sql}) THEN least(greatest({sql}, -{_LARGEST}), {_LARGEST}) ELSE {sql} END)::FLOAT"


def derivation(objective: dict[str, Any]) -> Derivation:
    """What follows for the tokens of a run of this objective.

    Args:
        objective: name and hyperparameters, as run.json has them.
    """
    given = objective.get("hyperparameters") or {}
    if isinstance(given.get("base"), dict):
        # an objective around another one: its terms are the inner one's, its multiplier is its own
        inner = derivation({"name": given["base"].get("name"), "hyperparameters": given["base"]})
        columns = {name: sql for name, sql in inner.columns.items() if name != "gradient_multiplier"}
        return Derivation(inner.stages, columns, inner.hazard)
    name = str(objective.get("name"))
    numbers = {k: f"{float(v)!r}::DOUBLE" for k, v in given.items() if _is_number(v)}
    try:
        return _mhpo(name, numbers) if name in _MODULATED else Derivation()
    except KeyError:  # an imported run may not say with which hyperparameters it was made
        return Derivation()


def _mhpo(name: str, numbers: dict[str, str]) -> Derivation:
    stages = [{"_psi": _MODULATED[name].format(**numbers)}]
    columns = {"modulated_log_ratio": "_psi"}
    exponent = "_psi"
    if name not in _NO_HAZARD:
        shift = f"CASE WHEN {_PULLS_BACK} THEN 0 ELSE _psi END" if name == "mhpo_sa" else "_psi"
        stages += [
            {"_shift": shift},
            {"_decay": "exp(-abs(_shift))"},
            # log(1 + e^−|x|): 2·atanh(y / (2 + y)) is log(1 + y) with the digits of a small y
            {"_tail": "2 * atanh(_decay / (2 + _decay))"},
            {
                "_positive": _hazard("_shift", numbers["lambda_pos"], numbers["k_pos"]),
                "_negative": _hazard("-_shift", numbers["lambda_neg"], numbers["k_neg"]),
            },
        ]
        columns |= {
            "hazard_positive": "_positive", "hazard_negative": "_negative", "survival_weight": "exp(-hazard::DOUBLE)",
        }  # fmt: skip
        exponent += " - hazard::DOUBLE"
    if name in _MULTIPLIERS:
        # log sech²(x) in a form that keeps its digits for large x
        stages += [{"_double": f"2 * abs(log_ratio::DOUBLE / {numbers['c']})"}]
        slope = "ln(4::DOUBLE) - _double - 2 * ln(1 + exp(-_double))"
        columns["gradient_multiplier"] = f"exp({exponent} + {slope})"
    return Derivation(tuple(stages), columns, "_positive + _negative" if name not in _NO_HAZARD else "")


def _hazard(shift: str, scale: str, exponent: str) -> str:
    """(softplus(shift) / scale)^exponent"""
    return f"pow((CASE WHEN {shift} > 0 THEN {shift} ELSE 0 END + _tail) / {scale}, {exponent})"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
