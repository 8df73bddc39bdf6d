"""The live board: every panel of a run in one figure with one time axis.

Shape letters: K columns of steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from app.figures import density
from app.figures.canvas import Canvas, Floats, Spec
from app.figures.encode import label, typed
from collectors.window import Window
from mhpo_core.histograms import quantiles

LIVE_METRICS = [
    "reward_mean", "entropy_mean", "grad_norm", "hazard_positive_mean", "hazard_negative_mean", "survival_weight_mean",
    "kl_old_new_k3", "kl_rollout_old_k3", "ess_fraction", "clip_fraction_low", "clip_fraction_high", "log_ratio_min",
    "log_ratio_max", "n_tokens", "recorder_ms", "nonfinite_count", "loss", "dropped_tokens",
]  # fmt: skip

_RATIO = ("log_ratio_min", "log_ratio_max")
_NO_RATIO = "not recorded: needs logp_new and logp_old of the tokens"
_LEFT, _RIGHT = (0.085, 0.615), (0.665, 0.998)
_QUANTILES = {"0.1 %": 0.001, "1 %": 0.01, "median": 0.5, "99 %": 0.99, "99.9 %": 0.999}


def board(window: Window, on_policy: dict[str, float], objective: str) -> Spec:
    """All panels of one window of a run.

    Args:
        window: what to draw, at least one column.
        on_policy: the objective's terms at ratio 1, drawn as baselines.
        objective: its name, untrusted.

    Returns:
        {"data": …, "layout": …} with symbolic colours.
    """
    # the middle of the bin, not of the steps that are in it yet: evenly spaced columns are painted several times faster
    x = window.first[: window.size] // window.width * window.width + (window.width - 1) / 2.0
    figure = Canvas(x, window.width)
    _policy_shift(figure, window)
    has_hazard = "hazard" in on_policy
    (_hazard if has_hazard else _clipping)(figure, window, on_policy, objective)
    _layers(figure, window)
    _reward(figure, window)
    _gradient_norm(figure, window)
    (_survival if has_hazard else _sample_size)(figure, window, on_policy)
    _divergence(figure, window)
    _entropy(figure, window)
    figure.layout |= {
        "showlegend": False, "hovermode": "x", "dragmode": "zoom", "margin": {"l": 8, "r": 8, "t": 4, "b": 24},
        "paper_bgcolor": "@card", "plot_bgcolor": "@background", "font": {"color": "@text", "size": 12},
        "hoverlabel": {"font": {"size": 11}, "namelength": -1}, "transition": {"duration": 0},
    }  # fmt: skip
    return {"data": figure.traces, "layout": figure.layout}


def _policy_shift(figure: Canvas, window: Window) -> None:
    size = window.size
    counts = window.log_ratio[:size].sum(axis=1)
    names = window.metrics.names
    low = window.metrics.low[:size, names.index("log_ratio_min")]
    high = window.metrics.high[:size, names.index("log_ratio_max")]
    limit = density.axis_limit(np.concatenate([low, high]))
    ticks = [t for t in density.TICKS if t <= limit]
    ticks = [-t for t in reversed(ticks) if t] + ticks
    figure.panel(
        _LEFT, (0.5, 0.965), "Policy shift",
        "log importance ratio of every token, nats · lines: 0.1, 1, 50, 99, 99.9 %, min and max",
        tickvals=[float(density.to_axis(t)) for t in ticks], ticktext=[f"{t:g}" for t in ticks], showgrid=False,
        range=[float(density.to_axis(-limit)), float(density.to_axis(limit))],
    )  # fmt: skip
    rows, shades = density.image(counts, limit)
    figure.traces.append(
        {
            "type": "heatmap", "x": typed(figure.x), "y": typed(rows), "z": typed(shades, "u1"), "zmin": 0, "zmax": 255,
            "colorscale": "@density", "showscale": False, "hoverinfo": "skip", "name": "density", **figure.axes,
        }
    )  # fmt: skip
    found = quantiles(counts, np.array(list(_QUANTILES.values())))
    bounded = np.clip(found, low[:, None], high[:, None])
    lines = {name: bounded[:, i] for i, name in enumerate(_QUANTILES)}
    for name, values in {"max": high, **lines, "min": low}.items():
        outer = name in ("min", "max")
        drawn = np.where(np.isfinite(values), values, np.nan)
        style = {"width": 1, "dash": "dot"} if outer else {"width": 1.6 if name == "median" else 0.9}
        figure.line(
            density.to_axis(drawn), name, "@tail" if outer else "@quantile", line=style, customdata=typed(drawn),
            hovertemplate="%{customdata:.4g}",
        )  # fmt: skip
    figure.say_if_empty(window, _RATIO, _NO_RATIO)


def _key(colour: str, text: str) -> str:
    """An entry of the legend that stands in a panel's title."""
    return f"<span style='color:@{colour}'>■</span> {text}"


def _hazard(figure: Canvas, window: Window, on_policy: dict[str, float], _: str) -> None:
    legend = f"{_key('expansion', 'ζ₊ expansion')}  {_key('contraction', 'ζ₋ contraction')} · token mean"
    figure.panel(_LEFT, (0.27, 0.43), "Cumulative hazard", legend)
    figure.metric(window, "hazard_positive_mean", "ζ₊", "@expansion")
    figure.metric(window, "hazard_negative_mean", "ζ₋", "@contraction")
    figure.baseline(on_policy["hazard_positive"], f"ζ₊ on-policy {on_policy['hazard_positive']:.3f}")
    figure.baseline(on_policy["hazard_negative"], f"ζ₋ on-policy {on_policy['hazard_negative']:.3f}", below=True)


def _clipping(figure: Canvas, window: Window, _: dict[str, float], objective: str) -> None:
    legend = f"{_key('expansion', 'above')}  {_key('contraction', 'below')} · share of tokens"
    figure.panel(
        _LEFT, (0.27, 0.43), "Clipped tokens", f"{legend} · {label(objective)} has no hazard", rangemode="tozero"
    )
    figure.metric(window, "clip_fraction_high", "clipped above", "@expansion")
    figure.metric(window, "clip_fraction_low", "clipped below", "@contraction")
    without = "this objective has no bound to clip at" if figure.has(window, _RATIO) else _NO_RATIO
    figure.say_if_empty(window, ("clip_fraction_high", "clip_fraction_low"), without)


def _layers(figure: Canvas, window: Window) -> None:
    names = window.gradients.names
    shown = [label(_short(n)) for n in names]
    figure.panel(
        _LEFT, (0.0, 0.2), "Gradient norm per layer", "before clipping · colour: log₁₀ against the layer's median",
        type="category", showgrid=False, tickvals=shown, ticktext=[s if len(s) < 18 else s[:16] + "…" for s in shown],
    )  # fmt: skip
    figure.y_axis["tickfont"] = {"size": 9, "color": "@muted"}
    if not names:
        figure.annotate("not recorded: pass gradient_norms to Recorder.record", _LEFT[0] + 0.01, 0.09)
        return
    figure.traces.append(
        {
            "type": "heatmap", "x": typed(figure.x), "y": shown, "z": typed(_against_median(window).T), "zmin": -1,
            "zmax": 1.5, "colorscale": "@density", "showscale": False, "name": "layers", **figure.axes,
            "hovertemplate": "%{y}: 10^%{z:.2f} × median<extra></extra>",
        }
    )  # fmt: skip


def _against_median(window: Window) -> Floats:
    """log₁₀ of each layer's norm over its median; an exactly zero or non-finite norm is a gap."""
    mean = window.gradients.mean(window.size)
    logarithm = np.log10(np.where(mean > 0, mean, np.nan))
    known = ~np.isnan(logarithm).all(axis=0)
    logarithm[:, known] -= np.nanmedian(logarithm[:, known], axis=0)
    return logarithm


def _short(parameter: str) -> str:
    """`model.layers.3.self_attn` → `3.self_attn`: what differs between rows."""
    return parameter.removeprefix("model.").removeprefix("layers.")


def _small(figure: Canvas, row: int, title: str, note: str, **axis: Any) -> None:
    top = 0.965 - row * 0.208
    figure.panel(_RIGHT, (max(0.0, top - 0.128), top), title, note, **axis)


def _reward(figure: Canvas, window: Window) -> None:
    _small(figure, 0, "Reward", "sequence mean")
    figure.metric(window, "reward_mean", "reward", "@line", band="@band")
    figure.say_if_empty(window, ("reward_mean",), "not recorded: pass reward to Recorder.record")


def _gradient_norm(figure: Canvas, window: Window) -> None:
    _small(figure, 1, "Gradient norm", "global L2 before clipping", type="log", exponentformat="power")
    figure.metric(window, "grad_norm", "gradient norm", "@line", band="@band")
    figure.log_ticks(window, "grad_norm")
    figure.say_if_empty(window, ("grad_norm",), "not recorded: pass grad_norm to Recorder.record")


def _survival(figure: Canvas, window: Window, on_policy: dict[str, float]) -> None:
    _small(figure, 2, "Survival weight", "exp(−ζ), token mean")
    figure.metric(window, "survival_weight_mean", "survival weight", "@line", band="@band")
    figure.baseline(on_policy["survival_weight"], f"on-policy {on_policy['survival_weight']:.3f}")


def _sample_size(figure: Canvas, window: Window, on_policy: dict[str, float]) -> None:
    _small(figure, 2, "Effective sample size", "(Σr)² / Σr² ÷ tokens")
    figure.metric(window, "ess_fraction", "ESS", "@line", band="@band")
    figure.say_if_empty(window, ("ess_fraction",), _NO_RATIO)


def _divergence(figure: Canvas, window: Window) -> None:
    legend = f"k3, nats  {_key('line', 'old‖new')}  {_key('second', 'rollout‖old')}"
    _small(figure, 3, "KL", legend, type="log", exponentformat="power")
    figure.metric(window, "kl_old_new_k3", "KL(old‖new), k3", "@line")
    figure.metric(window, "kl_rollout_old_k3", "KL(rollout‖old), k3", "@second")
    figure.log_ticks(window, "kl_old_new_k3", "kl_rollout_old_k3")
    figure.say_if_empty(window, ("kl_old_new_k3", "kl_rollout_old_k3"), _NO_RATIO)


def _entropy(figure: Canvas, window: Window) -> None:
    _small(figure, 4, "Entropy", "nats, token mean", rangemode="tozero")
    figure.metric(window, "entropy_mean", "entropy", "@line", band="@band")
    figure.say_if_empty(window, ("entropy_mean",), "not recorded: pass entropy in TokenBatch")
