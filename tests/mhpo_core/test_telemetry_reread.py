"""Terms read back from the histogram of log-ratios against the terms of the tokens themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mhpo_core import objectives
from mhpo_core.errors import ObjectiveError
from mhpo_core.objectives import OBJECTIVES
from mhpo_core.telemetry import measure, term_distribution

FROM_RATIO = [name for name, cls in OBJECTIVES.items() if cls.follows_from_ratio]


def test_what_needs_more_than_the_ratio_is_refused():
    assert set(OBJECTIVES) - set(FROM_RATIO) == {
        "dppo_tv", "dppo_kl", "gspo", "luspo", "gmpo", "vespo", "seq_tis", "seq_mis", "geo_mis", "opsm_ppo",
        "trm_max_k2", "trm_mean_k3", "decoupled",
    }  # fmt: skip
    with pytest.raises(ObjectiveError, match=r"gspo need more than a token's own ratio"):
        term_distribution(objectives.create("gspo"), [], "gradient_multiplier")


@pytest.mark.parametrize("name", FROM_RATIO)
def test_any_objective_follows_from_the_histogram_another_one_recorded(name, random_batch):
    batch = random_batch(1, 40, 50)
    recorded = measure(batch, objectives.create("ppo_clip")).histograms
    objective = objectives.create(name)
    found = term_distribution(objective, recorded, "gradient_multiplier")
    exact = objective.terms(batch).gradient_multiplier[batch.mask]
    assert found.count.sum() == batch.mask.sum()
    # a clip bound can cut a bin in two: 3 % of the mean covers it for these 1,400 tokens
    assert found.mean == pytest.approx(exact.mean().item(), rel=0.03)
    weighted = (exact.abs() * batch.advantage[batch.mask].abs()).sum().item()
    assert float(np.abs(found.value) @ found.advantage_weight) == pytest.approx(weighted, rel=0.03)


@pytest.mark.parametrize("term", ["hazard_positive", "survival_weight", "modulated_log_ratio"])
def test_the_terms_of_mhpo_with_other_hyperparameters(term, random_batch):
    batch = random_batch(2, 40, 50)
    objective = objectives.create("mhpo", c=0.8, k_neg=1.2)
    found = term_distribution(objective, measure(batch, objectives.create("mhpo")).histograms, term)
    exact = getattr(objective.terms(batch), term)[batch.mask]
    assert found.mean == pytest.approx(exact.mean().item(), rel=0.01, abs=0.005)


def test_an_infinite_ratio_tends_to_its_limit(random_batch):
    batch = random_batch(3)
    batch.logp_old[batch.mask] = torch.inf
    found = term_distribution(
        objectives.create("mhpo"), measure(batch, objectives.create("mhpo")).histograms, "survival_weight"
    )
    # log r = −Inf: exp(−ζ) at ψ = −c
    assert found.mean == pytest.approx(objectives.create("mhpo").terms(batch).survival_weight[batch.mask].mean().item())


def test_a_term_the_objective_lacks(random_batch):
    histograms = measure(random_batch(0), objectives.create("mhpo")).histograms
    for name, term in (("ppo_clip", "survival_weight"), ("mhpo", "surrogate"), ("mhpo", "nonsense")):
        with pytest.raises(ObjectiveError, match=f"{name} has no term '{term}'"):
            term_distribution(objectives.create(name), histograms, term)
    assert term_distribution(objectives.create("mhpo"), [], "survival_weight").mean is None
