"""Configuration: every key is checked, presets load, overrides and TOML round trips."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import mhpo_core.training
from mhpo_core import objectives
from mhpo_core.errors import ConfigError, MhpoError, ObjectiveError
from mhpo_core.training import Config, apply_overrides, from_dict, list_presets, load_config, load_preset, to_toml
from mhpo_core.training.faults import FAULTS, LrSpike, Mismatch
from mhpo_core.training.tasks import TASKS

PRESET_FILES = sorted((Path(mhpo_core.training.__file__).parent / "presets").glob("*.toml"))


def sections() -> dict[str, dict]:
    return {k: v for k, v in Config().to_dict().items() if isinstance(v, dict)}


def settings() -> list[tuple[str, dict, str]]:
    """(section, table that selects the variant, key) of every checked setting."""
    found = [
        (s, {}, f.name) for s in sections() for f in fields(getattr(Config(), s)) if f.metadata and s not in VARIANTS
    ]
    for section, variants in VARIANTS.items():
        found += [(section, {"name": n}, f.name) for n, cls in variants.items() for f in fields(cls) if f.metadata]
    return found


VARIANTS = {"task": TASKS, "fault": FAULTS}


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda p: p.stem)
def test_every_preset_loads_under_its_own_name_and_survives_toml(path):
    config = load_preset(path.stem)
    assert config.name == path.stem
    assert path.stem in list_presets()
    assert from_dict(tomllib.loads(to_toml(config))) == config
    assert from_dict(config.to_dict()) == config


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("name", [*objectives.OBJECTIVES, *objectives.ALIASES])
def test_every_objective_can_replace_a_presets_own(path, name):
    config = load_preset(path.stem, [f"objective.name={name}"])
    assert config.objective.create() == objectives.create(name)
    assert config.objective.aggregation == load_preset(path.stem).objective.aggregation


@pytest.mark.parametrize(("section", "base", "key"), settings(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_value_of_the_wrong_type_is_refused_by_section_and_key(section, base, key):
    for wrong in ([1], {"a": 1}):
        with pytest.raises(ConfigError, match=rf"^\[{section}\]: {key} = .*allowed .*Change it in \[{section}\]"):
            from_dict({section: {**base, key: wrong}})


@pytest.mark.parametrize("section", sections())
def test_an_unknown_key_is_refused_with_the_valid_ones(section):
    if section == "objective":  # further keys are hyperparameters
        with pytest.raises(ObjectiveError, match=r"no hyperparameter nonsense, valid are c, k_pos"):
            from_dict({section: {"nonsense": 1}})
        return
    with pytest.raises(ConfigError, match=rf"^\[{section}\]: unknown key 'nonsense', valid are .*\w"):
        from_dict({section: {"nonsense": 1}})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"optimiser": {}}, r"top level: unknown key 'optimiser', .* Did you mean 'optimizer'\?"),
        ({"iterations": 0}, r"top level: iterations = 0, allowed is a whole number ≥ 1\."),
        ({"iterations": True}, r"iterations = True, allowed is a whole number ≥ 1"),
        ({"iterations": 2.0}, r"iterations = 2\.0, allowed is a whole number"),
        ({"model": 3}, r"\[model\]: got 3, allowed is a table"),
        ({"optimizer": {"lr": 0}}, r"\[optimizer\]: lr = 0\.0, allowed is a finite number > 0\."),
        ({"optimizer": {"lr": float("nan")}}, r"lr = nan, allowed is a finite number"),
        ({"optimizer": {"lr_final": 1.5}}, r"lr_final = 1\.5, allowed is a finite number ≥ 0 and ≤ 1"),
        ({"optimizer": {"mini_batches": 2}}, r"Did you mean 'minibatches'\?"),
        ({"optimizer": {"minibatches": 3}}, r"minibatches = 3 for 256 completions .* allowed are its divisors"),
        ({"model": {"hidden_size": 20, "heads": 4}}, r"hidden_size = 20 with heads = 4"),
        ({"rollout": {"old_policy": "sampler"}}, r"old_policy = 'sampler', allowed are rollout, recomputed"),
        ({"task": {"name": "digitsum"}}, r"\[task\]: name = 'digitsum', allowed are .* Did you mean 'digit-sum'\?"),
        ({"fault": {"name": "none", "at": 3}}, r"\[fault\]: unknown key 'at', valid are name"),
        ({"objective": {"aggregation": "mean"}}, r"\[objective\]: aggregation = 'mean', allowed are .*token-mean"),
        ({"objective": {"c": -1}}, r"mhpo: c = -1, allowed are finite numbers > 0"),
        ({"objective": {"name": "ppoclip"}}, r"unknown objective 'ppoclip'.*Did you mean 'ppo_clip'"),
    ],
)
def test_messages_say_what_was_given_and_what_is_allowed(table, message):
    with pytest.raises(MhpoError, match=message):
        from_dict(table)


@pytest.mark.parametrize(
    ("name", "key"), [(n, f.name) for n, cls in objectives.OBJECTIVES.items() for f in fields(cls) if f.init]
)
def test_a_text_for_a_hyperparameter_is_refused(name, key):
    with pytest.raises(ObjectiveError, match="allowed|valid are"):
        from_dict({"objective": {"name": name, key: "x"}})


@pytest.mark.parametrize(
    ("name", "aggregation", "normalizes_std"),
    [
        ("grpo", "seq-mean-token-mean", True),
        ("dr_grpo", "trl-dr_grpo", False),
        ("dapo", "token-mean", True),
        ("luspo", "seq-mean-token-sum", True),
        ("mhpo_token_mean", "token-mean", True),
    ],
)
def test_a_recipe_brings_its_aggregation_and_its_advantages(name, aggregation, normalizes_std):
    config = from_dict({"objective": {"name": name}})
    assert config.objective.create() == objectives.recipe(name).objective
    assert config.objective.resolved_aggregation == aggregation
    assert config.objective.normalizes_std == normalizes_std
    other = from_dict({"objective": {"name": name, "aggregation": "token-sum"}})
    assert other.objective.resolved_aggregation == "token-sum"


@pytest.mark.parametrize(
    "table",
    [
        {"name": "decoupled", "base": {"name": "mhpo", "c": 2.0}, "clip_max": 5.0},
        {"name": "opsm_ppo", "base": "sapo", "tau_pos": 0.5},
        {"name": "topr", "neg_clip": [0.1, 0.9]},
    ],
)
def test_nested_hyperparameters_survive_toml(table):
    config = from_dict({"objective": table})
    again = from_dict(tomllib.loads(to_toml(config)))
    assert again == config and again.objective.create() == config.objective.create()


def test_overrides_are_toml_values_or_plain_text():
    table = {"optimizer": {"lr": 1e-3, "epochs": 2}}
    changed = apply_overrides(
        table, ["optimizer.lr=1e-4", "objective.name=grpo", 'name = "a b"', "rollout.normalize_std=false", "seed=7"]
    )
    assert changed == {
        "optimizer": {"lr": 1e-4, "epochs": 2},
        "objective": {"name": "grpo"},
        "name": "a b",
        "rollout": {"normalize_std": False},
        "seed": 7,
    }
    assert table == {"optimizer": {"lr": 1e-3, "epochs": 2}}


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "a.b.c=1", ".lr=1", "optimizer.=1"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(ConfigError, match=r"allowed is key=value or section\.key=value"):
        apply_overrides({}, [override])


def test_another_name_drops_the_settings_of_the_one_it_replaces():
    table = {
        "objective": {"name": "ppo_clip", "eps_high": 0.3, "aggregation": "token-mean"},
        "fault": {"name": "mismatch", "sigma": 3.0},
    }
    config = from_dict(apply_overrides(table, ["objective.name=mhpo", "objective.c=0.3", "fault.name=lr-spike"]))
    assert config.objective.to_dict() == {"name": "mhpo", "aggregation": "token-mean", "c": 0.3}
    assert config.fault == LrSpike()
    same = from_dict(apply_overrides(table, ["fault.name=mismatch", "fault.at=3"]))
    assert same.fault == Mismatch(at=3, sigma=3.0)


def test_a_file_lies_over_a_preset_and_overrides_over_both(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[optimizer]\nlr = 1e-5\n', encoding="utf-8")
    config = load_config(file, preset="mismatch", overrides=["optimizer.epochs=2"])
    preset = load_preset("mismatch")
    assert (config.name, config.optimizer.lr, config.optimizer.epochs) == ("mine", 1e-5, 2)
    assert (config.fault, config.rollout) == (preset.fault, preset.rollout)


def test_a_file_that_is_missing_or_not_toml_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read \(No such file"):
        load_config(tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("a = \n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML \(.*line 1"):
        load_config(broken)
    with pytest.raises(ConfigError, match=r"preset: got 'helthy', allowed are .* Did you mean 'healthy'\?"):
        load_preset("helthy")


def test_updates_per_iteration_is_epochs_times_minibatches():
    assert from_dict({"optimizer": {"epochs": 3, "minibatches": 4}}).updates_per_iteration == 12
