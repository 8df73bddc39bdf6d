"""NaN, ±Inf and NULL, dtypes, who owns the data, and what `record` refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from collectors import Recorder, StoreError
from mhpo_core import MhpoError, Sequences, TokenBatch, objectives
from mhpo_core.errors import BatchError
from mhpo_core.gradients import GradientNorms
from tests.collectors.support import B, T, column, everything, rows, same, token_batch

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def recorder(tmp_path):
    with Recorder(tmp_path / "run", objective="mhpo", fsync=False) as recorder:
        yield recorder


@pytest.mark.parametrize("options", [{}, {"tokens": "all"}, {"columns": "minimal"}, {"precision": "compact"}], ids=str)
def test_nonfinite_values_stay_what_they_are(tmp_path, options):
    hostile = torch.tensor([[NAN, INF, -INF, -0.5]])
    batch = TokenBatch(
        logp_new=hostile, logp_old=torch.full((1, 4), -0.5), advantage=torch.tensor([[1.0, INF, NAN, -INF]]),
        mask=torch.ones(1, 4), entropy=hostile, logp_rollout=hostile,
    )  # fmt: skip
    with Recorder(tmp_path / "run", objective="mhpo", fsync=False, **options) as recorder:
        norms = {"a": NAN, "b": -INF}
        recorder.record(0, batch, loss=NAN, grad_norm=INF, gradient_norms=norms, metrics={"m": -INF}, reward=[NAN])
    found = rows(tmp_path / "run", "SELECT logp_new, advantage, entropy, log_ratio FROM tokens ORDER BY position")
    assert same(found, [(NAN, 1.0, NAN, NAN), (INF, INF, INF, INF), (-INF, NAN, -INF, -INF), (-0.5, -INF, -0.5, 0.0)])
    assert same(rows(tmp_path / "run", "SELECT loss, grad_norm FROM steps"), [(NAN, INF)])
    assert same(rows(tmp_path / "run", "SELECT parameter, grad_norm FROM gradients"), [("a", NAN), ("b", -INF)])
    assert rows(tmp_path / "run", "SELECT value FROM metrics") == [(-INF,)]
    assert same(rows(tmp_path / "run", "SELECT reward, advantage FROM sequences"), [(NAN, NAN)])
    counts = rows(tmp_path / "run", "SELECT nonfinite_count, log_ratio_max, log_ratio_min, log_ratio_mean FROM steps")
    assert counts == [(4, INF, -INF, 0.0)]


def test_null_means_not_computed_and_nothing_else(tmp_path):
    bare = dict.fromkeys(("logp_rollout", "logp_ref", "entropy", "sum_p_squared", "token_id"))
    with Recorder(tmp_path / "run", objective="grpo", fsync=False) as recorder:
        recorder.record(0, token_batch(0, **bare))
    absent = "logp_rollout, logp_ref, entropy, token_id, token, hazard, modulated_log_ratio, survival_weight"
    for name in absent.split(", "):
        assert set(column(tmp_path / "run", f"SELECT {name} FROM tokens")) == {None}, name
    missing = "loss, lr, reward_mean, grad_norm, mismatch_p50, kl_rollout_old_k3, entropy_mean, hazard_mean"
    assert set(rows(tmp_path / "run", f"SELECT {missing}, zero_std_groups, truncated_fraction FROM steps")[0]) == {None}
    fields = "reward, group_id, truncated, policy_lag, prompt, completion"
    assert set(sum(rows(tmp_path / "run", f"SELECT {fields} FROM sequences"), ())) == {None}
    known = "logp_new, log_ratio, gradient_multiplier, logit_grad_norm, sequence_id, position"
    assert None not in sum(rows(tmp_path / "run", f"SELECT {known} FROM tokens"), ())
    counts = rows(tmp_path / "run", "SELECT clip_fraction_low IS NULL, nonfinite_count, dropped_tokens FROM steps")
    assert counts == [(False, 0, 0)]


def test_unknown_entries_of_a_sequence_field_are_null(tmp_path, recorder):
    recorder.record(
        0, token_batch(0), sequences=Sequences(completion=["a", None, "", "None"], policy_lag=[0, None, 1, 2])
    )
    recorder.close()
    found = rows(tmp_path / "run", "SELECT completion, policy_lag FROM sequences ORDER BY sequence_id")
    assert found == [("a", 0), (None, None), ("", 1), ("None", 2)]


def test_a_masked_sequence_has_a_row_and_no_advantage(tmp_path, recorder):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[2] = False
    recorder.record(0, token_batch(0, mask=mask))
    recorder.close()
    found = rows(tmp_path / "run", "SELECT length, advantage IS NULL FROM sequences ORDER BY sequence_id")
    assert found == [(T, False), (T, False), (0, True), (T, False)]
    assert column(tmp_path / "run", "SELECT DISTINCT sequence_id FROM tokens ORDER BY 1") == [0, 1, 3]
    assert rows(tmp_path / "run", "SELECT n_sequences, n_tokens FROM steps") == [(3, 3 * T)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_dtype_is_stored_as_its_nearest_float32(tmp_path, recorder, dtype):
    batch = token_batch(3)
    new, old = batch.logp_new.to(dtype), batch.logp_old.to(dtype)
    recorder.record(0, token_batch(3, logp_new=new, logp_old=old), reward=torch.tensor([1, 2, 3, 4.0], dtype=dtype))
    recorder.close()
    mask = batch.mask
    found = rows(tmp_path / "run", "SELECT logp_new, logp_old, log_ratio FROM tokens ORDER BY sequence_id, position")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.stack([new.to(wide), old.to(wide), new.to(wide) - old.to(wide)])[:, mask].float().T.tolist()
    assert [list(row) for row in found] == expected
    assert column(tmp_path / "run", "SELECT reward FROM sequences ORDER BY sequence_id") == [1, 2, 3, 4]


def test_the_trainer_may_change_everything_right_after_record(tmp_path):
    def record(path, spoil):
        generator = torch.Generator().manual_seed(0)
        with Recorder(path, objective="mhpo", fsync=False) as recorder:
            for step in range(20):
                batch = token_batch(step)
                sequences = Sequences(
                    reward=np.arange(4.0), group_id=[0, 0, 1, 1], prompt=list("abcd"), truncated=torch.zeros(4).bool()
                )  # fmt: skip
                norms = GradientNorms(1.0, {"a": 1.0}, {"a": 2.0}, {"a": 0})
                metrics = {"lr": 0.5}
                recorder.record(step, batch, sequences=sequences, gradient_norms=norms, metrics=metrics)
                if not spoil:
                    continue
                for name in ("logp_new", "logp_old", "logp_rollout", "logp_ref", "entropy", "sum_p_squared"):
                    getattr(batch, name).copy_(torch.rand(B, T, generator=generator))
                batch.token_id.zero_()
                batch.mask.fill_(True)
                sequences.reward[:] = -1.0
                sequences.truncated.fill_(True)
                sequences.group_id.clear()
                sequences.prompt[:] = ["x"] * 4
                norms.by_group["b"] = norms.by_group.pop("a")
                metrics["lr"] = 9.0

    record(tmp_path / "kept", spoil=False)
    record(tmp_path / "spoilt", spoil=True)
    for path in ("kept", "spoilt"):
        assert column(tmp_path / path, "SELECT count(*) FROM steps") == [20]
    tables = ("tokens", "sequences", "gradients", "metrics", "histograms")
    assert everything(tmp_path / "kept", tables) == everything(tmp_path / "spoilt", tables)


def test_gradients_come_from_norms_or_from_a_mapping(tmp_path, recorder):
    recorder.record(0, token_batch(0), gradient_norms=GradientNorms(5.0, {"a": 3.0, "b": 4.0}, {"a": 1.0}, {"a": 1}))
    recorder.record(1, token_batch(0), gradient_norms={"a": torch.tensor(3.0), "b": np.float32(4)})
    recorder.record(2, token_batch(0), gradient_norms=GradientNorms(5.0, {}, {}, {}), grad_norm=torch.tensor(6.0))
    recorder.close()
    found = rows(tmp_path / "run", "FROM gradients ORDER BY step, parameter")
    assert found == [(0, 0, "a", 3.0, 1.0, 1), (0, 0, "b", 4.0, None, None), (1, 0, "a", 3.0, None, None),
                     (1, 0, "b", 4.0, None, None)]  # fmt: skip
    assert column(tmp_path / "run", "SELECT grad_norm FROM steps") == [5.0, None, 6.0]


def test_metrics_fill_the_columns_of_their_name_unless_given_directly(tmp_path, recorder):
    recorder.record(0, token_batch(0), metrics={"lr": 1e-6, "loss": 2.0, "grad_norm": 3.0, "other": 4})
    recorder.record(1, token_batch(0), metrics={"loss": 2.0, "grad_norm": 3.0}, loss=0.0, grad_norm=NAN)
    recorder.record(2, token_batch(0), loss=torch.tensor(1.5, requires_grad=True) * 1)
    recorder.close()
    found = rows(tmp_path / "run", "SELECT lr, loss, grad_norm FROM steps")
    assert same(found, [(1e-6, 2.0, 3.0), (None, 0.0, NAN), (None, 1.5, None)])
    assert len(rows(tmp_path / "run", "FROM metrics WHERE step = 0")) == 4


def test_groups_of_equal_reward_are_counted(tmp_path, recorder):
    groups = Sequences(
        group_id=[7, 7, 9, 9], reward=[1.0, 1.0, 0.0, 1.0], truncated=np.array([True, False, False, True])
    )
    recorder.record(0, token_batch(0), sequences=groups)
    recorder.close()
    found = rows(
        tmp_path / "run", "SELECT reward_mean, reward_std, zero_std_groups, n_groups, truncated_fraction FROM steps"
    )
    # (1 + 1 + 0 + 1) / 4 = 0.75, variance = 0.75 - 0.75²
    assert found == [(0.75, pytest.approx(math.sqrt(0.1875)), 1, 2, 0.5)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"step": -1}, "step is -1"),
        ({"step": 1.0}, "step is 1.0"),
        ({"step": "3"}, "step is '3'"),
        ({"reward": [1.0]}, "reward has 1 entries for 4 sequences"),
        ({"sequences": Sequences(prompt=["a"] * 5)}, "prompt has 5 entries for 4"),
        ({"sequences": Sequences(group_id=["a", "b", "c", "d"])}, "group_id cannot be stored"),
        ({"sequences": Sequences(sequence_id=[1, 2, 3, None])}, "sequence_id cannot be stored"),
        ({"reward": torch.zeros(4, 2)}, "reward cannot be stored"),
        ({"metrics": {"note": "text"}}, "note is 'text'"),
        ({"loss": torch.zeros(2)}, "loss is tensor"),
        ({"gradient_norms": {"a": None}}, "a is None"),
    ],
)
def test_a_wrong_argument_is_named_and_does_no_harm(tmp_path, recorder, arguments, says):
    recorder.record(0, token_batch(0))
    with pytest.raises(BatchError, match="(Recorder.record|Sequences): ") as raised:
        recorder.record(**{"step": 1, "batch": token_batch(1)} | arguments)
    assert says in str(raised.value) and "\n" not in str(raised.value)
    recorder.record(1, token_batch(1))
    recorder.close()
    assert rows(tmp_path / "run", "SELECT step, attempt FROM steps_all") == [(0, 0), (1, 0)]
    assert "rewound" not in column(tmp_path / "run", "SELECT kind FROM events")


def test_a_closed_recorder_says_so(tmp_path, recorder):
    recorder.close()
    recorder.close("failed", "a second close does nothing")
    with pytest.raises(StoreError, match="is closed"):
        recorder.record(0, token_batch(0))
    assert column(tmp_path / "run", "SELECT kind FROM events") == ["started", "finished"]


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (ValueError("bad \udcff"), ("failed", "ValueError: bad ?")),
        (KeyboardInterrupt(), ("stopped", "interrupted")),
        (SystemExit(0), ("stopped", "the process exited")),
        (SystemExit(3), ("failed", "SystemExit: 3")),
        (MhpoError("x"), ("failed", "MhpoError: x")),
    ],
)
def test_the_last_event_says_how_the_run_ended(tmp_path, error, event):
    with pytest.raises(type(error)), Recorder(tmp_path / "run", objective="mhpo", fsync=False):
        raise error
    assert rows(tmp_path / "run", "SELECT kind, detail FROM events")[-1] == event


def test_psi_is_null_where_the_objective_has_none_and_uses_the_runs_own_constant(tmp_path):
    for name, objective in (("two", objectives.create("mhpo", c=2.0)), ("ppo", "ppo_clip")):
        with Recorder(tmp_path / name, objective=objective, fsync=False) as recorder:
            recorder.record(0, token_batch(0))
    found = rows(tmp_path / "two", "SELECT log_ratio, modulated_log_ratio FROM tokens")
    assert [psi for _, psi in found] == pytest.approx([2 * math.tanh(x / 2) for x, _ in found], rel=1e-6)
    assert set(column(tmp_path / "ppo", "SELECT modulated_log_ratio FROM tokens")) == {None}


@pytest.mark.parametrize("name", ["mhpo_lfm_only", "mhpo_dhp_only", "mhpo_no_stopgrad", "mhpo_sa", "decoupled"])
def test_psi_is_the_objectives_own(tmp_path, name):
    objective = objectives.create(name, **({"base": "mhpo", "c": 0.7} if name == "decoupled" else {"c": 0.7}))
    batch = token_batch(0)
    with Recorder(tmp_path / "run", objective=objective, fsync=False) as recorder:
        recorder.record(0, batch)
    expected = objective.terms(batch).modulated_log_ratio[batch.mask].tolist()
    found = column(tmp_path / "run", "SELECT modulated_log_ratio FROM tokens ORDER BY sequence_id, position")
    assert found == pytest.approx(expected, rel=1e-6)
