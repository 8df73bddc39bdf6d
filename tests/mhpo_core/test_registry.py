"""Objectives by name, by recipe and by import path, and what is said about bad ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch

from mhpo_core import MhpoError, objectives
from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives import ALIASES, OBJECTIVES, RECIPES, AutogradObjective, Objective, aggregate

HYPERPARAMETERS = [(name, f.name, f.type) for name, cls in OBJECTIVES.items() for f in fields(cls)]
# a lower bound of 0 or less is none, as verl's CISPO script writes it
LOWER_BOUNDS = ("ratio_min", "clip_min")
NUMBERS = [(name, key) for name, key, kind in HYPERPARAMETERS if kind in ("float", "float | None")]


@dataclass(frozen=True)
class NaivePpo(AutogradObjective):
    """A user's own objective: the surrogate alone."""

    name: ClassVar[str] = "naive_ppo"
    canonical_aggregation: ClassVar[str] = "token-mean"

    eps: float = 0.2

    def surrogate(self, tokens):
        ratio = tokens.exponent.exp()
        return torch.minimum(ratio * tokens.advantage, ratio.clamp(1 - self.eps, 1 + self.eps) * tokens.advantage)


class Nameless(AutogradObjective):
    def surrogate(self, tokens):
        return tokens.log_ratio


NOT_AN_OBJECTIVE = object()


class TestCreate:
    @pytest.mark.parametrize("name", [*OBJECTIVES, *ALIASES])
    def test_by_name_and_alias(self, name):
        created = objectives.create(name)
        assert isinstance(created, Objective) and created.name == ALIASES.get(name, name)
        assert objectives.create(name, **created.hyperparameters()) == created

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_hyperparameters_survive_json(self, name):
        created = objectives.create(name)
        assert objectives.create(name, **json.loads(json.dumps(created.hyperparameters()))) == created

    @pytest.mark.parametrize("name", ["", "gppo", None, "MHPO2", 3])
    def test_unknown_name(self, name):
        with pytest.raises(ObjectiveError) as error:
            objectives.create(name)
        assert repr(name) in str(error.value)
        assert all(valid in str(error.value) for valid in [*OBJECTIVES, *ALIASES])

    def test_a_close_name_is_suggested(self):
        with pytest.raises(ObjectiveError, match=r"Did you mean 'mhpo'\?"):
            objectives.create("mhop")

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_unknown_hyperparameter(self, name):
        with pytest.raises(ObjectiveError, match=r"has no hyperparameter epsilon, valid are "):
            objectives.create(name, epsilon=0.1)

    def test_the_valid_hyperparameters_are_listed(self):
        with pytest.raises(ObjectiveError, match=r"mhpo has no hyperparameter eps, valid are c, k_pos, lambda_pos"):
            objectives.create("mhpo", eps=0.1)

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "0.2", True])
    @pytest.mark.parametrize(("name", "key"), NUMBERS)
    def test_a_number_out_of_range(self, name, key, value):
        if value == -1.0 and key in LOWER_BOUNDS:
            assert objectives.create(name, **{key: value}).hyperparameters()[key] == value
            return
        with pytest.raises(ObjectiveError) as error:
            objectives.create(name, **{key: value})
        message = str(error.value)
        assert message.startswith(f"{name}: ") and f"{key} = {value!r}" in message and "allowed are" in message
        assert isinstance(error.value, MhpoError) and isinstance(error.value, ValueError)

    @pytest.mark.parametrize(
        ("name", "given", "message"),
        [
            ("grpo", {"eps_low": -0.1}, r"eps_low = -0.1, allowed are finite numbers ≥ 0\. Change it"),
            ("mhpo", {"c": 0.0}, r"c = 0.0, allowed are finite numbers > 0"),
            ("mhpo", {"k_neg": None}, r"k_neg = None"),
            ("mhpo_lfm_only", {"dhp": True}, r"dhp = True, allowed is False\. Take the objective mhpo"),
            ("mhpo_dhp_only", {"lfm": 0}, r"lfm = 0, allowed is False"),
            ("dual_clip", {"dual_c": 1.0}, r"dual_c = 1.0, allowed are finite numbers > 1"),
            ("two_sided_clip", {"delta": 0}, r"delta = 0, allowed are finite numbers > 0"),
            ("cispo", {"ratio_min": 6.0}, r"ratio_min = 6.0 with ratio_max = 5.0, allowed are ratio_min ≤ ratio_max"),
            ("topr", {"neg_clip": (1, 0)}, r"neg_clip = \(1, 0\), allowed are two finite numbers 0 ≤ low ≤ high"),
            ("topr", {"pos_clip": 1.0}, r"pos_clip = 1.0, allowed are two finite numbers"),
            ("decoupled", {"mode": "token"}, r"mode = 'token', allowed are token_truncate, token_mask"),
            ("decoupled", {"mode": "token_mask_two_sided", "clip_min": 4}, r"clip_min = 4 with clip_max = 3.0"),
            ("decoupled", {"base": "gppo"}, r"unknown objective 'gppo'"),
            ("decoupled", {"base": 3}, r"decoupled: base = 3, allowed are objectives"),
            ("opsm_ppo", {"base": "mhpo", "eps_low": 0.1}, r"mhpo has no hyperparameter eps_low"),
        ],
    )
    def test_messages_say_what_was_given_and_what_is_allowed(self, name, given, message):
        with pytest.raises(ObjectiveError, match=message):
            objectives.create(name, **given)

    def test_edges_of_the_ranges(self):
        assert objectives.create("grpo", eps_low=0, eps_high=0).hyperparameters() == {"eps_low": 0, "eps_high": 0}
        assert objectives.create("tis", ratio_min=0.5).ratio_min == 0.5
        for name in ("tis", "mis", "icepop", "seq_mis", "geo_mis"):
            assert objectives.create(name, ratio_min=None, ratio_max=None).ratio_max is None
        given = {"mode": "token_truncate", "clip_max": 3.0, "clip_min": None, "eps_low": 0.2}
        assert objectives.create("decoupled", **given).clip_min is None


class TestBase:
    def test_a_wrapper_takes_the_name_and_the_hyperparameters_of_what_is_inside(self):
        created = objectives.create("decoupled", base="mhpo", c=2.0, clip_max=5.0)
        assert created.base == objectives.create("mhpo", c=2.0) and created.clip_max == 5.0

    def test_without_a_base_its_hyperparameters_go_to_the_default_one(self):
        assert objectives.create("opsm_ppo", eps_low=0.1, kl_threshold=0.2).base == objectives.create(
            "ppo_clip", eps_low=0.1
        )
        assert objectives.create("trm_max_k2").base.name == "is_pg"

    def test_wrappers_nest(self):
        inner = objectives.create("opsm_ppo", base=objectives.create("sapo", tau_pos=2.0))
        outer = objectives.create("decoupled", base=inner)
        assert objectives.create("decoupled", **outer.hyperparameters()) == outer


class TestImportPath:
    path = f"{__name__}:NaivePpo"

    def test_a_users_objective_is_created_with_its_hyperparameters(self):
        created = objectives.create(self.path, eps=0.3)
        assert type(created).__name__ == "NaivePpo" and created.hyperparameters() == {"eps": 0.3}

    def test_autograd_finds_the_multiplier_of_the_closed_form(self, random_batch):
        batch = random_batch(3)
        own, ppo = objectives.create(self.path).terms(batch), objectives.create("ppo_clip").terms(batch)
        torch.testing.assert_close(own.surrogate, ppo.surrogate, rtol=1e-12, atol=0)
        live = batch.mask & (batch.advantage != 0)
        torch.testing.assert_close(own.gradient_multiplier[live], ppo.gradient_multiplier[live], rtol=1e-12, atol=1e-15)

    def test_a_surrogate_of_whole_sequences_on_ragged_rows(self, random_batch):
        class NaiveGspo(AutogradObjective):
            name = "naive_gspo"
            canonical_aggregation = "seq-mean-token-mean"

            def surrogate(self, tokens):
                ratio = tokens.sequence_mean(tokens.log_ratio).exp()
                return torch.minimum(ratio * tokens.advantage, ratio.clamp(0.9, 1.1) * tokens.advantage)

        batch = random_batch(5)
        batch = replace(batch, advantage=torch.tensor([1.0, -2.0, 0.0, 0.5, 1.0]).double())
        own, built_in = NaiveGspo().terms(batch), objectives.create("gspo", eps_low=0.1, eps_high=0.1).terms(batch)
        torch.testing.assert_close(own.surrogate, built_in.surrogate, rtol=1e-12, atol=0)
        live = batch.mask & (batch.advantage != 0)
        assert live.any(dim=1).sum() >= 3 and not batch.mask.all(dim=1).any()
        torch.testing.assert_close(
            own.gradient_multiplier[live], built_in.gradient_multiplier[live], rtol=1e-12, atol=0
        )

    def test_it_goes_inside_a_wrapper(self):
        assert objectives.create("decoupled", base=self.path, eps=0.4).base.eps == 0.4

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            (
                "no_such_package.objectives:Mine",
                r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_package'\)",
            ),
            ("math:Mine", r"cannot be imported \(AttributeError: module 'math' has no attribute 'Mine'\)"),
            (":Mine", r"cannot be imported"),
            ("math:pi", r"'math:pi' is not an objective, allowed are subclasses"),
            (f"{__name__}:NOT_AN_OBJECTIVE", r"is not an objective"),
            (f"{__name__}:Nameless", r"lacks name or canonical_aggregation"),
        ],
    )
    def test_what_cannot_be_one_is_refused(self, path, message):
        with pytest.raises(ObjectiveError, match=message):
            objectives.create(path)

    def test_a_module_that_fails_is_one_sentence(self, tmp_path, monkeypatch):
        (tmp_path / "broken_objective.py").write_text("def :")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ObjectiveError, match=r"'broken_objective:Mine' cannot be imported \(SyntaxError"):
            objectives.create("broken_objective:Mine")

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            ({"surrogate": "x"}, r"odd: evaluate gave no gradient_multiplier, allowed are surrogate"),
            ({"surrogate": "sum", "gradient_multiplier": "x"}, r"odd: evaluate gave surrogate \(\), allowed are"),
            ({"surrogate": "x", "gradient_multiplier": "x", "slope": "x"}, r"odd: evaluate gave slope \(5, 7\)"),
        ],
    )
    def test_what_its_class_returns_is_checked(self, returned, message, random_batch):
        class Odd(Objective):
            name = "odd"
            canonical_aggregation = "token-mean"

            def evaluate(self, tokens):
                made = {"x": tokens.log_ratio, "sum": tokens.log_ratio.sum()}
                return {name: made[kind] for name, kind in returned.items()}

        with pytest.raises(ObjectiveError, match=message):
            Odd().terms(random_batch(0))

    def test_a_surrogate_that_is_already_summed(self, random_batch):
        class Summed(AutogradObjective):
            name = "summed"
            canonical_aggregation = "token-mean"

            def surrogate(self, tokens):
                return tokens.log_ratio.sum()

        with pytest.raises(ObjectiveError, match=r"summed: evaluate gave surrogate \(\)"):
            Summed().terms(random_batch(0))


class TestRecipes:
    @pytest.mark.parametrize("name", RECIPES)
    def test_a_recipe_is_its_objective_with_its_aggregation(self, name, random_batch):
        recipe, batch = objectives.recipe(name), random_batch(2, spread=0.05)
        terms = recipe.objective.terms(batch)
        expected = -aggregate(terms.surrogate, batch.mask, recipe.aggregation, 8.0)
        assert recipe.loss(batch, 8.0).item() == pytest.approx(expected.item(), rel=1e-12)
        assert recipe.source

    def test_hyperparameters_reach_the_objective(self):
        assert objectives.recipe("dapo", eps_high=0.3).objective == objectives.create("dapo_clip", eps_high=0.3)

    def test_only_dr_grpo_leaves_the_standard_deviation_out(self):
        assert [n for n in RECIPES if not objectives.recipe(n).normalize_std] == ["dr_grpo"]

    def test_an_unknown_recipe_lists_the_known_ones(self):
        with pytest.raises(ObjectiveError, match=r"recipe: unknown name 'drgrpo', .* Did you mean 'dr_grpo'\?"):
            objectives.recipe("drgrpo")
