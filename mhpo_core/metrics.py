"""The one table of step metrics: name, label, unit, how parts reduce, formula, source.

The columns of `steps`, the labels of the dashboard and the metric reference in the docs all come from here.
"""

from __future__ import annotations

from dataclasses import dataclass

# Rules by which the parts of a step (ranks, micro-batches) become one value.
SUM, MINIMUM, MAXIMUM, LAST = "sum", "min", "max", "last"
TOKEN_MEAN, SEQUENCE_MEAN = "token mean", "sequence mean"
RANK_MEAN = "mean over the ranks that gave one, each counting the same"
QUANTILE = "quantile: exact within one part, from merged histograms across parts"
FROM_SUMS = "from the sums of the parts"

QUANTILE_LEVELS = {
    "p0001": 0.0001, "p001": 0.001, "p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5,
    "p75": 0.75, "p95": 0.95, "p99": 0.99, "p999": 0.999, "p9999": 0.9999,
}  # fmt: skip
SIDES = {"positive": "A > 0", "negative": "A < 0", "zero": "A = 0"}
SUFFIX_OF_SIDE = {"positive": "_adv_pos", "negative": "_adv_neg"}


@dataclass(frozen=True)
class Metric:
    """One column of `steps`.

    Args:
        name: column name.
        label: what the dashboard prints.
        unit: "nats", "1" for dimensionless, …
        reduction: one of the rules above.
        formula: exact definition; r = exp(log_ratio), means are over trained tokens with a finite value.
        source: where the definition comes from, empty where it is plain counting.
        integer: stored as a 64-bit integer.
    """

    name: str
    label: str
    unit: str
    reduction: str
    formula: str
    source: str = ""
    integer: bool = False


def _distribution(prefix: str, label: str, formula: str, suffix: str = "", where: str = "") -> list[Metric]:
    note = f" over tokens with {where}" if where else ""
    rows = [
        Metric(f"{prefix}_mean{suffix}", f"{label}, mean{note}", "nats", TOKEN_MEAN, f"mean of {formula}{note}"),
        Metric(
            f"{prefix}_min{suffix}", f"{label}, smallest{note}", "nats", MINIMUM, f"min of {formula}{note}, −Inf kept"
        ),
        Metric(
            f"{prefix}_max{suffix}", f"{label}, largest{note}", "nats", MAXIMUM, f"max of {formula}{note}, +Inf kept"
        ),
    ]
    for name, level in QUANTILE_LEVELS.items():
        formula_q = f"{level:g}-quantile of {formula}{note}, linear interpolation"
        rows.append(
            Metric(f"{prefix}_{name}{suffix}", f"{label}, {level:g}-quantile{note}", "nats", QUANTILE, formula_q)
        )
    return rows


def _table() -> list[Metric]:
    k3 = "Schulman 2020, Approximating KL divergence"
    rows = [
        Metric("n_tokens", "trained tokens", "tokens", SUM, "Σ mask", integer=True),
        Metric("n_sequences", "sequences", "sequences", SUM, "rows with at least one trained token", integer=True),
        Metric("loss", "loss", "reward", RANK_MEAN, "as the trainer reports it"),
        Metric("lr", "learning rate", "1", LAST, "as the trainer reports it"),
        Metric("reward_mean", "reward", "reward", SEQUENCE_MEAN, "mean reward of the sequences of the step"),
        Metric(
            "reward_std", "reward, standard deviation", "reward", FROM_SUMS, "population standard deviation of reward"
        ),
        *_distribution("log_ratio", "log-ratio", "logp_new − logp_old"),
        Metric("log_ratio_std", "log-ratio, standard deviation", "nats", FROM_SUMS, "population standard deviation"),
    ]
    for side, suffix in SUFFIX_OF_SIDE.items():
        rows += _distribution("log_ratio", "log-ratio", "logp_new − logp_old", suffix, SIDES[side])
    rows += [
        *_distribution("mismatch", "engine mismatch", "logp_old − logp_rollout"),
        Metric("hazard_mean", "cumulative hazard ζ", "1", TOKEN_MEAN, "mean of ζ₊ + ζ₋", "arXiv 2603.16929"),
        Metric("hazard_positive_mean", "hazard of positive shifts ζ₊", "1", TOKEN_MEAN, "mean of (softplus(ψ)/λ₊)^k₊", "arXiv 2603.16929"),
        Metric("hazard_negative_mean", "hazard of negative shifts ζ₋", "1", TOKEN_MEAN, "mean of (softplus(−ψ)/λ₋)^k₋", "arXiv 2603.16929"),
        Metric("modulated_log_ratio_mean", "modulated log-ratio ψ", "nats", TOKEN_MEAN, "mean of c·tanh(log r / c)", "arXiv 2603.16929"),
        Metric("survival_weight_mean", "survival weight", "1", TOKEN_MEAN, "mean of exp(−ζ)", "arXiv 2603.16929"),
        Metric("gradient_multiplier_mean", "gradient multiplier M", "1", TOKEN_MEAN, "mean of ∂J/∂logp_new ÷ A over tokens with A ≠ 0"),
        Metric("ess_fraction", "effective sample size", "share of tokens", FROM_SUMS, "(Σr)² / Σr² / n", "Kong 1992"),
        Metric("kl_old_new_k1", "KL(old‖new), k1", "nats", TOKEN_MEAN, "mean of −log r", k3),
        Metric("kl_old_new_k3", "KL(old‖new), k3", "nats", TOKEN_MEAN, "mean of expm1(log r) − log r", k3),
        Metric("kl_rollout_old_k3", "KL(rollout‖old), k3", "nats", TOKEN_MEAN, "mean of expm1(d) − d with d = logp_old − logp_rollout", k3),
        Metric("clip_fraction_low", "clipped below", "share of tokens", TOKEN_MEAN, "the lower bound stops the gradient"),
        Metric("clip_fraction_high", "clipped above", "share of tokens", TOKEN_MEAN, "the upper bound stops the gradient"),
        Metric("out_of_range_fraction", "ratio out of range", "share of tokens", TOKEN_MEAN, "ratio outside the bounds, sign of A ignored"),
        Metric("restoring_lost_fraction", "restoring force lost", "share of tokens", TOKEN_MEAN, "of the tokens with A·log r < 0, which an update pulls back: M below a tenth of M at ratio 1"),
        Metric("entropy_mean", "entropy", "nats", TOKEN_MEAN, "mean of −Σ_v p_v log p_v of the policy being trained"),
        Metric("grad_norm", "gradient norm", "1", LAST, "global L2 norm before clipping"),
        Metric("logit_grad_norm_mean", "token gradient norm", "1", TOKEN_MEAN, "mean of |A·M|·sqrt(1 − 2p + Σp²); |A·M|·(1 − p) where Σp² is not recorded"),
        Metric("logit_grad_norm_max", "token gradient norm, largest", "1", MAXIMUM, "max of the token gradient norm"),
        Metric("logit_grad_norm_top1_share", "gradient held by the top 1 % of tokens", "share", FROM_SUMS, "Σ over the ⌈n/100⌉ largest token gradient norms ÷ Σ over all"),
        Metric("logit_grad_norm_exact_count", "token gradient norms with Σp²", "tokens", SUM, "trained tokens whose norm is |A·M|·sqrt(1 − 2p + Σp²); that of the others is |A·M|·(1 − p), at most √2 too small", integer=True),
        Metric("zero_std_groups", "dead groups", "groups", SUM, "groups whose rewards are all equal", integer=True),
        Metric("n_groups", "groups", "groups", SUM, "groups of the step", integer=True),
        Metric("length_mean", "response length", "tokens", SEQUENCE_MEAN, "mean number of trained tokens of a sequence"),
        Metric("truncated_fraction", "truncated", "share of sequences", SEQUENCE_MEAN, "stopped by the length limit"),
        Metric("nonfinite_count", "non-finite tokens", "tokens", SUM, "trained tokens with a NaN or ±Inf log-probability or advantage", integer=True),
        Metric("clamped_count", "clamped tokens", "tokens", SUM, "trained tokens whose ratio does not fit the dtype", integer=True),
        Metric("impossible_count", "impossible tokens", "tokens", SUM, "trained tokens with log p > 1e-4, entropy < −1e-4 or Σp² > 1 + 1e-4: a wrong kernel", integer=True),
        Metric("dropped_tokens", "tokens not stored", "tokens", SUM, "tokens whose rows were dropped because the disk could not keep up", integer=True),
        Metric("recorder_ms", "recorder", "ms", SUM, "time the training thread spent in Recorder.record"),
    ]  # fmt: skip
    return rows


METRICS: dict[str, Metric] = {row.name: row for row in _table()}
