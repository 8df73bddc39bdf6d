"""Steps of which only a part is known: scalars, texts, or tokens without the policy being trained."""

from __future__ import annotations

import json
import math

import pytest
import torch

from collectors import open_run
from collectors.integrity import verify
from collectors.storage import LocalStorage
from mhpo_core import Sequences
from mhpo_core.errors import BatchError
from tests.collectors.support import column, new_recorder, rows, token_batch


def test_a_step_without_tokens_has_its_scalars_and_its_texts(tmp_path):
    texts = Sequences(
        completion=["a", "b"], reward=[1.0, 2.0], advantage=[0.5, math.nan], length=[3, None],
        extra=[{"uid": "é", "score": math.nan}, None],
    )  # fmt: skip
    with new_recorder(tmp_path / "run", tokens="all") as recorder:
        recorder.record(3, None, sequences=texts, metrics={"lr": 1e-6, "theirs": 7}, wall_time=12.5)
        recorder.record(4, None, columns={"entropy_mean": 0.25, "n_tokens": 9.0}, loss=math.nan)
        recorder.record(5, token_batch(5))
    with open_run(tmp_path / "run") as run:
        found = rows(run, "SELECT step, wall_time, lr, reward_mean, n_tokens, log_ratio_mean FROM steps WHERE step = 3")
        assert found == [(3, 12.5, 1e-6, 1.5, None, None)]
        assert rows(run, "SELECT entropy_mean, n_tokens, isnan(loss), n_sequences FROM steps WHERE step = 4") == [
            (0.25, 9, True, None)
        ]
        first, second = rows(run, "SELECT completion, reward, advantage, length, extra FROM sequences WHERE step = 3")
        assert first[:4] == ("a", 1.0, 0.5, 3) and json.loads(first[4])["uid"] == "é"
        assert second[0] == "b" and math.isnan(second[2]) and second[3:] == (None, None)
        assert column(run, "SELECT DISTINCT step FROM tokens") == [5]
        assert column(run, "SELECT DISTINCT step FROM sequences ORDER BY step") == [3, 5]
        assert rows(run, "SELECT step, name, value FROM metrics") == [(3, "lr", 1e-6), (3, "theirs", 7.0)]
    assert verify(LocalStorage(tmp_path / "run")).findings == []


@pytest.mark.parametrize("options", [{}, {"columns": "minimal"}, {"precision": "compact"}], ids=str)
def test_what_follows_from_an_unknown_policy_is_not_computed(tmp_path, options):
    batch = token_batch(0)
    stood_in = type(batch)(**(vars(batch) | {"logp_new": batch.logp_old.clone()}))
    with new_recorder(tmp_path / "run", tokens="all", **options) as recorder:
        recorder.record(0, stood_in, ratio_known=False)
        recorder.record(1, stood_in)
    with open_run(tmp_path / "run") as run:
        known = "n_tokens, n_sequences, mismatch_mean, kl_rollout_old_k3, entropy_mean, length_mean, nonfinite_count"
        unknown, given = (rows(run, f"SELECT {known} FROM steps WHERE step = {s}") for s in (0, 1))
        assert unknown == given and None not in unknown[0]
        follows = ("log_ratio_mean", "hazard_mean", "ess_fraction", "kl_old_new_k3", "clamped_count",
                   "gradient_multiplier_mean", "logit_grad_norm_max", "log_ratio_p50_adv_pos")  # fmt: skip
        assert rows(run, f"SELECT {', '.join(follows)} FROM steps WHERE step = 0") == [(None,) * len(follows)]
        assert column(
            run, "SELECT count(*) FROM histograms WHERE step = 0 AND quantity NOT IN ('mismatch', 'entropy')"
        ) == [0]
        follows = ("logp_new", "log_ratio", "hazard", "hazard_positive", "modulated_log_ratio", "survival_weight",
                   "gradient_multiplier", "logit_grad_norm")  # fmt: skip
        counted = ", ".join(f"count({name})" for name in follows)
        assert rows(run, f"SELECT {counted}, count(logp_old) FROM tokens WHERE step = 0") == [
            (0,) * len(follows) + (int(batch.mask.sum()),)
        ]


def test_rewards_that_are_not_known_count_nowhere(tmp_path):
    some = Sequences(reward=[1.0, None, 3.0, None], truncated=[True, None, False, None], group_id=[0, 0, 1, 1])
    none = Sequences(reward=[None, None], truncated=[None, None])
    with new_recorder(tmp_path / "run") as recorder:
        recorder.record(0, None, sequences=some)
        recorder.record(1, None, sequences=none)
        recorder.record(2, None, sequences=Sequences(reward=[1.0, math.nan]))
    with open_run(tmp_path / "run") as run:
        columns = "reward_mean, reward_std, truncated_fraction, n_groups, zero_std_groups"
        assert rows(run, f"SELECT {columns} FROM steps WHERE step < 2") == [(2.0, 1.0, 0.5, 2, 2), (None,) * 5]
        assert column(run, "SELECT isnan(reward_mean) FROM steps WHERE step = 2") == [True]


def test_a_column_that_is_none_and_a_value_that_is_no_number(tmp_path):
    with new_recorder(tmp_path / "run") as recorder:
        with pytest.raises(BatchError, match="'reward' is no column of steps, .* Give it in metrics."):
            recorder.record(0, None, columns={"reward": 1.0})
        with pytest.raises(BatchError, match="entropy_mean is 'x'"):
            recorder.record(0, None, columns={"entropy_mean": "x"})
        recorder.record(0, None, columns={"n_tokens": math.nan})
    assert rows(tmp_path / "run", "SELECT step, n_tokens FROM steps") == [(0, None)]


def test_ranks_without_tokens_are_merged(tmp_path):
    recorders = [new_recorder(tmp_path / "run", rank=rank, world_size=2) for rank in (0, 1)]
    for rank, recorder in enumerate(recorders):
        recorder.record(0, None, sequences=Sequences(reward=torch.tensor([1.0, 3.0 + rank])))
        recorder.close()
    assert rows(tmp_path / "run", "SELECT step, reward_mean FROM steps") == [(0, 2.25)]
    assert column(tmp_path / "run", "SELECT count(*) FROM sequences") == [4]
