"""The generator on runs of a second: it resumes, labels, and writes a manifest that points at what is there."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from collectors import open_run
from mhpo_core.training import from_dict, list_presets
from tests.benchmarks.collapses import generate as generating
from tests.benchmarks.collapses.generate import generate, write_manifest
from tests.benchmarks.collapses.modes import MODES, Case, cases


@dataclass(frozen=True)
class TinyCase(Case):
    """NaN in every token from iteration 5 of 25 on, or never."""

    @property
    def config(self):
        return from_dict(
            {
                "name": self.id,
                "iterations": 25,
                "model": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16},
                "task": {"digits": 1},
                "warm_start": {"steps": 15, "batch_size": 32, "lr": 0.02, "lr_warmup": 0},
                "rollout": {"prompts": 8, "group_size": 4, "max_new_tokens": 2},
                "objective": {"name": "grpo"},
                "optimizer": {"minibatches": 2},
                "fault": {"name": "nan", "at": 5, "share": 1.0} if self.faulty else {"name": "none"},
            }
        )


@pytest.fixture
def tiny_cases():
    mode = next(m for m in MODES if m.name == "nan")
    return [TinyCase(mode, 0, True), TinyCase(mode, 0, False)]


@pytest.mark.parametrize("slim", [False, True])
def test_a_set_can_be_continued_and_its_manifest_points_at_what_is_there(tiny_cases, tmp_path, monkeypatch, slim):
    list(generate(tmp_path, tiny_cases[:1], slim=slim))
    (tmp_path / tiny_cases[1].id).mkdir()  # what a killed process leaves
    trained = []
    real = generating.train
    monkeypatch.setattr(generating, "train", lambda config, *rest: (trained.append(config.name), real(config, *rest)))
    assert list(generate(tmp_path, tiny_cases, slim=slim)) == tiny_cases
    assert trained == ["nan-twin-0"]
    labels = {case.id: label.label for case, label in write_manifest(tmp_path, tiny_cases)}
    assert labels == {"nan-0": "collapsed", "nan-twin-0": "healthy"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["n"] == 2 and manifest["counts"] == {"collapsed": 1, "healthy": 1}
    faulty, twin = manifest["runs"]
    assert (faulty["fault_step"], faulty["onset_step"], faulty["onset_row"]) == (10, 10, 10)
    assert (faulty["failure_mode"], twin["failure_mode"]) == ("nan", None)
    assert twin["fault_step"] is twin["onset_step"] is twin["onset_row"] is None
    for entry in manifest["runs"]:
        table = pd.read_parquet(tmp_path / entry["file"])
        assert table["step"].tolist() == list(range(50)) and entry["n_rows"] == 50
        steps = open_run(tmp_path / entry["store"]).sql("SELECT * FROM steps ORDER BY step").df()
        for column, stored in (("reward", "reward_mean"), ("entropy", "entropy_mean"), ("loss", "loss")):
            np.testing.assert_array_equal(table[column], steps[stored])


def test_a_slim_store_has_the_same_scalars_and_the_tokens_of_every_20th_iteration(tiny_cases, tmp_path):
    (twin,) = tiny_cases[1:]
    for name, slim in (("whole", False), ("slim", True)):
        list(generate(tmp_path / name, [twin], slim=slim))
    whole, slim = (open_run(tmp_path / name / twin.id) for name in ("whole", "slim"))
    ours, theirs = (run.sql("SELECT * FROM steps ORDER BY step").df() for run in (slim, whole))
    own = {"wall_time", "recorder_ms", "kept_tokens", "ring_tokens"}
    for column in set(ours) - own:
        np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-5, atol=1e-7, err_msg=column)
    kept = slim.sql("SELECT DISTINCT step FROM tokens ORDER BY step").fetchall()
    assert kept == [(0,), (1,), (40,), (41,)]


def test_every_mode_is_a_preset_and_its_twin_differs_in_the_cause_alone():
    assert len({m.name for m in MODES}) == len(MODES)
    for case in cases(1):
        assert case.mode.name in list_presets()
        config = case.config
        changed = {k for k, v in config.to_dict().items() if v != Case(case.mode, 0, True).config.to_dict()[k]}
        cured = {override.split(".")[0] for override in case.mode.cure}
        assert changed == (set() if case.faulty else {"name", "seed", *cured})
        assert config.name == case.id or case.faulty


def test_no_two_runs_have_the_same_configuration_and_seed():
    keys = [{k: v for k, v in case.config.to_dict().items() if k != "name"} for case in cases(3)]
    assert len(keys) == len({json.dumps(k, sort_keys=True) for k in keys}) == 2 * 3 * len(MODES)


def test_the_fault_step_counts_optimizer_steps():
    faulty = {case.mode.name: case for case in cases(1) if case.faulty}
    assert faulty["mismatch"].fault_step == 240  # iteration 120, two steps each
    assert faulty["reuse"].fault_step == 0
