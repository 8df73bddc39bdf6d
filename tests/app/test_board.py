"""The live figure, without Streamlit and without a browser."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.figures import density
from app.figures.board import LIVE_METRICS, board
from app.theme import PALETTES
from collectors import open_run
from collectors.tail import RunTail
from collectors.window import StepSummary, Window
from mhpo_core import objectives
from mhpo_core.histograms import EDGES, N_BINS
from mhpo_core.metrics import METRICS
from tests.app.runs import record_run


def decoded(values: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    return flat.reshape([int(n) for n in values["shape"].split(",")]) if "shape" in values else flat


def named(figure: dict[str, Any], name: str) -> dict[str, Any]:
    (trace,) = [t for t in figure["data"] if t["name"] == name]
    return trace


def drawn(run: Path, window: str = "all") -> dict[str, Any]:
    tail = RunTail(run, LIVE_METRICS)
    tail.poll()
    objective = tail.manifest["objective"]["name"]
    figure = board(tail.windows[window], tail.manifest["on_policy"], objective)
    tail.close()
    return figure


def symbols(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value} if value.startswith("@") else set()
    if isinstance(value, dict):
        return set() if "bdata" in value else set().union(*map(symbols, value.values()), set())
    return set().union(*map(symbols, value), set()) if isinstance(value, list | tuple) else set()


def test_the_lines_are_the_numbers_of_the_store(tmp_path: Path) -> None:
    record_run(tmp_path / "run", 12)
    figure = drawn(tmp_path / "run")
    with open_run(tmp_path / "run") as run:
        steps = run.sql("SELECT * FROM steps ORDER BY step").df()
    for name, column in {
        "reward": "reward_mean", "gradient norm": "grad_norm", "survival weight": "survival_weight_mean",
        "ζ₊": "hazard_positive_mean", "ζ₋": "hazard_negative_mean", "entropy": "entropy_mean",
        "KL(old‖new), k3": "kl_old_new_k3", "KL(rollout‖old), k3": "kl_rollout_old_k3",
    }.items():  # fmt: skip
        np.testing.assert_allclose(decoded(named(figure, name)["y"]), steps[column], rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(decoded(named(figure, name)["x"]), steps["step"])
    # quantile lines come from bins that are at most 1/8 of a value wide; extremes are exact
    for name, column in {"1 %": "log_ratio_p01", "99 %": "log_ratio_p99", "median": "log_ratio_p50"}.items():
        found = decoded(named(figure, name)["customdata"])
        np.testing.assert_allclose(found, steps[column], rtol=0.35, atol=0.02, err_msg=name)
    for name in ("min", "max"):
        np.testing.assert_allclose(decoded(named(figure, name)["customdata"]), steps[f"log_ratio_{name}"], rtol=1e-6)


def test_updates_of_one_iteration_are_one_column(tmp_path: Path) -> None:
    record_run(tmp_path / "run", 12, updates=4)
    figure = drawn(tmp_path / "run")
    np.testing.assert_array_equal(decoded(named(figure, "gradient norm")["x"]), [1.5, 5.5, 9.5])
    np.testing.assert_allclose(decoded(named(figure, "gradient norm")["y"]), [2.5, 6.5, 10.5])
    assert figure["layout"]["xaxis"]["autorangeoptions"] == {"include": [-0.5, 11.5]}, "whole columns"
    band = named(figure, "gradient norm range")
    assert decoded(band["y"]).tolist() == [4, 8, 12, 9, 5, 1] and decoded(band["x"]).tolist() == [
        1.5,
        5.5,
        9.5,
        9.5,
        5.5,
        1.5,
    ]


@pytest.mark.parametrize("objective", sorted(objectives.OBJECTIVES))
def test_every_objective_has_a_board(tmp_path: Path, objective: str) -> None:
    record_run(tmp_path / "run", 3, objective=objective)
    figure = drawn(tmp_path / "run")
    titles = " ".join(a["text"] for a in figure["layout"]["annotations"])
    baseline = objectives.create(objective).on_policy_terms()
    assert ("Cumulative hazard" in titles) == ("hazard" in baseline)
    if "hazard" in baseline:
        assert f"on-policy {baseline['survival_weight']:.3f}" in titles
        assert any(s["y0"] == baseline["survival_weight"] for s in figure["layout"]["shapes"])
    for mode, palette in PALETTES.items():
        assert {s[1:] for s in symbols(figure)} <= set(palette), mode


def test_a_panel_without_data_says_why() -> None:
    def said(**metrics: float) -> str:
        window = Window(10, LIVE_METRICS)
        window.add(StepSummary(0, 0.0, metrics, {}, np.zeros((3, N_BINS), np.int64)))
        return " ".join(a["text"] for a in board(window, {}, "is_pg")["layout"]["annotations"])

    told = said(reward_mean=1.0, grad_norm=float("nan"), log_ratio_min=-0.1, log_ratio_max=0.1)
    assert "has no bound to clip at" in told and "pass entropy in TokenBatch" in told and "pass gradient_norms" in told
    assert "pass reward" not in told and "pass grad_norm to" not in told, "a NaN is data"
    assert told.count("needs logp_new and logp_old") == 2, "sample size and KL"
    told = said(reward_mean=1.0)
    assert "has no bound to clip at" not in told and told.count("needs logp_new and logp_old") == 4


def test_nan_is_a_mark_and_never_a_mere_gap(tmp_path: Path) -> None:
    window = Window(10, LIVE_METRICS)
    counts = np.zeros((3, N_BINS), np.int64)
    for step, value in enumerate([1.0, float("nan"), 2.0, float("inf")]):
        window.add(StepSummary(step, 0.0, {"grad_norm": value}, {}, counts))
    figure = board(window, {}, "ppo_clip")
    marks = named(figure, "gradient norm: NaN or ±Inf")
    np.testing.assert_array_equal(decoded(marks["x"]), [1, 3])
    assert marks["marker"]["symbol"] == "x"
    np.testing.assert_array_equal(decoded(named(figure, "gradient norm")["y"]), [1, np.nan, 2, np.nan])


def test_marks_have_a_place_on_a_logarithmic_axis() -> None:
    window = Window(10, LIVE_METRICS)
    counts = np.zeros((3, N_BINS), np.int64)
    for step, value in enumerate([0.0, float("nan")]):
        window.add(StepSummary(step, 0.0, {"grad_norm": value}, {}, counts))
    marks = named(board(window, {}, "ppo_clip"), "gradient norm: NaN or ±Inf")
    assert (decoded(marks["y"]) > 0).all()


def test_the_image_holds_every_token_in_its_row() -> None:
    counts = np.zeros((2, N_BINS), np.int64)
    positive = np.searchsorted(EDGES, 0.5, side="right") - 1
    counts[0, positive], counts[1, 0], counts[1, N_BINS - 1] = 10, 1, 99_999
    centres, shades = density.image(counts, limit=1.0)
    at = np.abs(centres - density.to_axis(0.53)).argmin()
    assert set(np.flatnonzero(shades[:, 0])) <= {at - 2, at - 1, at, at + 1, at + 2}
    assert shades[0, 1] > 0, "one token of 100,000 below the axis is still visible in the lowest row"
    assert shades[-1, 1] == 255 and np.count_nonzero(shades[:, 1]) == 2


def test_axis_limit_steps() -> None:
    assert density.axis_limit(np.array([np.nan, np.inf, -0.2])) == 0.3
    assert density.axis_limit(np.array([])) == density.LIMITS[0]
    assert density.axis_limit(np.array([1e6])) == density.LIMITS[-1]


def test_followed_metrics_exist() -> None:
    assert set(LIVE_METRICS) <= set(METRICS)
