"""Which tokens are kept, in which columns and with how many bits; what is left out follows from what is stored."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from collectors import Recorder, StoreError, open_run
from collectors.policy import (
    ALWAYS,
    HIGH_TAIL,
    LOW_TAIL,
    NON_FINITE,
    REASONS,
    RING,
    SAMPLED,
    SMALLEST_LIMIT,
    TAIL_TEXTS,
    TAIL_TOKENS,
    TokenPolicy,
    parse_bytes,
    sequence_hash,
)
from collectors.token_rows import _rounded
from mhpo_core import Sequences, TokenBatch, objectives
from mhpo_core.objectives import Objective
from tests.collectors.support import column, rows, token_batch

WIDE = 60
"""Sequences of a batch that has more tokens than sample and tails together."""


def wide_batch(step: int) -> TokenBatch:
    return token_batch(step, WIDE)


def texts(step: int, n: int = WIDE) -> Sequences:
    return Sequences(
        reward=[float(i) for i in range(n)],
        prompt=[f"prompt {step}/{i // 4}" for i in range(n)],
        completion=[f"completion {step}/{i}" for i in range(n)],
    )


# What a user writes


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("all", TokenPolicy("all", 0, 0)), ("sample:1", TokenPolicy("sample", 1, 0)),
        ("sample:999999999", TokenPolicy("sample", 999_999_999, 0)), ("flight", TokenPolicy("flight", 8, 256)),
        ("flight:1", TokenPolicy("flight", 8, 1)), ("flight:1000", TokenPolicy("flight", 8, 1000)),
    ],
)  # fmt: skip
def test_a_policy_is_read_and_written_as_text(text, policy):
    assert TokenPolicy.parse(text) == policy
    assert TokenPolicy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    "text",
    ["", "ALL", "none", "sample", "sample:", "sample:0", "sample:00", "sample:-1", "sample:1.5", "sample: 3",
     "flight:0", "flight:", "flight:007", "flight:9999999999", "all ", "flight:1\n", "sample:1,flight:2", "sample:٣",
     None, 8, b"all"],
)  # fmt: skip
def test_anything_else_is_refused_with_one_line(tmp_path, text):
    with pytest.raises(StoreError, match="allowed are 'all', 'sample:N'") as raised:
        Recorder(tmp_path / "run", objective="mhpo", tokens=text)
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), ("none", None), (16_000_000, 16_000_000), (1.6e7, 16_000_000), ("16MB", 16_000_000),
     (" 4 gb ", 4_000_000_000), ("0.5G", 500_000_000), ("20000K", 20_000_000), ("16000000", 16_000_000),
     ("1.5TB", 1_500_000_000_000), ("16000000B", 16_000_000)],
)  # fmt: skip
def test_bytes_are_read(given, expected):
    assert parse_bytes(given, "disk_limit") == expected


@pytest.mark.parametrize(
    "given",
    ["", "4 apples", "4PB", "-4GB", "4e9", "1 2GB", "4,000,000,000", "٤GB", "15999999", 15_999_999, 0, -1, True,
     math.nan, math.inf, 2**60, "9999999TB", [], b"4GB"],
)  # fmt: skip
def test_other_limits_are_refused_with_one_line(tmp_path, given):
    with pytest.raises(StoreError, match=f"allowed are a number of bytes from {SMALLEST_LIMIT:,} on") as raised:
        Recorder(tmp_path / "run", objective="mhpo", disk_limit=given)
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


# What is chosen of one step


@st.composite
def steps(draw):
    """Lengths of the sequences, ids and log-ratios with ties and non-finite values."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any))
    n = sum(lengths)
    scale = draw(st.sampled_from([1.0, 1e-30, 1e30]))
    usual = st.floats(-3, 3, width=32).map(lambda v: v * scale) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
    odd = st.sampled_from([math.nan, math.inf, -math.inf])
    values = draw(hnp.arrays(np.float32, n, elements=st.one_of(usual, odd) if draw(st.booleans()) else usual))
    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(lengths), max_size=len(lengths), unique=True))
    return np.repeat(np.arange(len(lengths)), lengths), values, np.array(ids, np.int64)


POLICIES = st.sampled_from(["all", "sample:1", "sample:4", "sample:1000", "flight:3", "flight"]).map(TokenPolicy.parse)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(steps(), POLICIES)
def test_every_token_has_one_reason_and_it_is_the_right_one(step, policy):
    row, log_ratio, ids = step
    choice = policy.choose(row, log_ratio, ids)
    reason = choice.reason
    assert len(reason) == len(row) and len(choice.text) == len(ids)
    if policy.kind == "all":
        assert (reason == ALWAYS).all() and choice.text.all()
        return
    # the sample: whole sequences, those with the smallest hashes, whatever their ratios
    sampled = np.zeros(len(ids), bool)
    sampled[sorted(range(len(ids)), key=lambda i: int(sequence_hash(ids[i : i + 1])[0]))[: policy.sequences]] = True
    assert ((reason == SAMPLED) == sampled[row]).all()
    if policy.kind == "sample":
        assert set(reason.tolist()) <= {SAMPLED, RING} and (choice.text == sampled).all()
        return
    check_tails(reason, log_ratio, sampled[row])
    tail_sequences = set(row[(reason != RING)].tolist())
    assert set(np.flatnonzero(choice.text)) <= tail_sequences | set(np.flatnonzero(sampled))
    assert sampled.sum() <= choice.text.sum() <= sampled.sum() + 3 * TAIL_TEXTS


def check_tails(reason, log_ratio, sampled):
    finite = np.isfinite(log_ratio)
    places = np.flatnonzero(~finite)
    first, later = places[:TAIL_TOKENS], places[TAIL_TOKENS:]
    assert (reason[first[~sampled[first]]] == NON_FINITE).all(), "a non-finite token below the bound is not kept"
    assert (reason[later[~sampled[later]]] == RING).all(), "more non-finite tokens than the bound are kept"
    assert not np.isin(reason[~finite], [LOW_TAIL, HIGH_TAIL]).any()
    assert not (reason[finite] == NON_FINITE).any()
    values, kept = np.sort(log_ratio[finite]), np.sort(log_ratio[finite & (reason != RING)])
    count = min(TAIL_TOKENS, max(len(values) // 2, min(len(values), 1)))
    assert (kept[:count] == values[:count]).all(), "the low tail is not exact"
    assert len(kept) == 0 or (kept[-count:] == values[-count:]).all(), "the high tail is not exact"
    for code in (LOW_TAIL, HIGH_TAIL):
        assert (reason == code).sum() <= TAIL_TOKENS


def test_the_sample_is_uniform_over_many_ids():
    """Chi-square of how often each place of a batch is sampled; ids are counted up, as the recorder does."""
    policy, n, repeats = TokenPolicy.parse("sample:4"), 32, 4000
    for stride in (1, 2, 1 << 40):
        hits = np.zeros(n)
        for step in range(repeats):
            ids = (np.arange(n, dtype=np.int64) + step * n) * stride
            hits[np.flatnonzero(policy.choose(np.arange(n), np.zeros(n, np.float32), ids).text)] += 1
        expected = repeats * 4 / n
        # 31 degrees of freedom: 61 is passed once in a thousand; drawn without replacement it is a little less
        assert ((hits - expected) ** 2 / expected).sum() < 61


def test_a_sequence_that_trains_again_is_sampled_again():
    policy, ids = TokenPolicy.parse("sample:3"), np.arange(40, dtype=np.int64)
    order = np.random.default_rng(0).permutation(40)
    zeros = np.zeros(40, np.float32)
    first, second = policy.choose(np.arange(40), zeros, ids).text, policy.choose(np.arange(40), zeros, ids[order]).text
    assert set(ids[first]) == set(ids[order][second])


# What is stored of a run

STEPS = 9


def record_wide(path, tokens, steps=range(STEPS), **options):
    with Recorder(path, objective="mhpo", fsync=False, tokens=tokens, **options) as recorder:
        for step in steps:
            recorder.record(step, wide_batch(step), sequences=texts(step))


def trained(step: int) -> dict[tuple[int, int], float]:
    """(sequence in the batch, position) → log-ratio of every trained token."""
    batch = wide_batch(step)
    log_ratio = batch.logp_new - batch.logp_old
    return {(b, t): float(log_ratio[b, t]) for b, t in batch.mask.nonzero().tolist()}


def stored(run, step: int) -> dict[tuple[int, int], tuple[float, str]]:
    found = rows(run, f"SELECT sequence_id, position, log_ratio, kept_because FROM tokens WHERE step = {step}")
    assert len({row[:2] for row in found}) == len(found), "a token is kept twice"
    return {(s - step * WIDE, p): (value, why) for s, p, value, why in found}


def test_all_keeps_all(tmp_path):
    record_wide(tmp_path / "run", "all")
    with open_run(tmp_path / "run") as run:
        for step in range(STEPS):
            assert stored(run, step) == {place: (value, "all") for place, value in trained(step).items()}
        assert column(run, "SELECT count(*) FROM sequences WHERE prompt IS NULL") == [0]


def test_a_sample_keeps_whole_sequences_and_a_row_of_every_other(tmp_path):
    record_wide(tmp_path / "run", "sample:3")
    with open_run(tmp_path / "run") as run:
        for step in range(STEPS):
            found, every = stored(run, step), trained(step)
            chosen = {s for s, _ in found}
            assert len(chosen) == 3 and found == {p: (v, "sample") for p, v in every.items() if p[0] in chosen}
            with_text = column(run, f"SELECT sequence_id FROM sequences WHERE step = {step} AND prompt IS NOT NULL")
            assert {s - step * WIDE for s in with_text} == chosen
        assert rows(run, "SELECT count(*), count(DISTINCT sequence_id), count(reward) FROM sequences") == [
            (STEPS * WIDE,) * 3
        ]
        assert column(run, "SELECT sum(dropped_tokens) FROM steps") == [0], "what the policy leaves out is not lost"


def test_the_flight_recorder_keeps_its_last_steps_whole_and_of_older_ones_sample_and_tails(tmp_path):
    record_wide(tmp_path / "run", "flight:4")
    with open_run(tmp_path / "run") as run:
        for step in range(STEPS):
            found, every = stored(run, step), trained(step)
            why = Counter(reason for _, reason in found.values())
            assert {place: value for place, (value, _) in found.items()}.items() <= every.items()
            values, kept = sorted(every.values()), sorted(v for v, reason in found.values() if reason != "ring")
            assert kept[:TAIL_TOKENS] == values[:TAIL_TOKENS] and kept[-TAIL_TOKENS:] == values[-TAIL_TOKENS:]
            assert why["sample"] == sum(
                1 for s, _ in every if s in {p[0] for p, f in found.items() if f[1] == "sample"}
            )
            assert set(why) <= set(REASONS) - {"all"}
            in_ring = step >= STEPS - 4
            assert (len(found) == len(every)) == in_ring and bool(why["ring"]) == in_ring
            check_texts(run, step, in_ring)
        assert column(run, "SELECT count(*) FROM sequences") == [STEPS * WIDE]


def check_texts(run, step, in_ring):
    found = rows(run, f"SELECT sequence_id, prompt, completion FROM sequences WHERE step = {step}")
    for sequence_id, prompt, completion in found:
        i = sequence_id - step * WIDE
        assert (prompt, completion) in ((None, None), (f"prompt {step}/{i // 4}", f"completion {step}/{i}"))
    given = sum(prompt is not None for _, prompt, _ in found)
    assert given == WIDE if in_ring else 8 <= given <= 8 + 2 * TAIL_TEXTS


def test_a_ring_after_a_gap_in_the_step_numbers_and_after_a_rewind(tmp_path):
    run = tmp_path / "run"
    record_wide(run, "flight:4", [0, 1, 2, 3, 100, 101])
    assert column(run, "SELECT DISTINCT step FROM tokens WHERE kept_because = 'ring' ORDER BY 1") == [100, 101]
    record_wide(run, "flight:4", [50, 51])
    reasons = rows(run, "SELECT DISTINCT step, kept_because FROM tokens WHERE kept_because IN ('ring', 'pinned')")
    assert sorted(reasons) == [(50, "ring"), (51, "ring"), (100, "pinned"), (101, "pinned")]


# Fewer columns, fewer bits

SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(hnp.arrays(np.uint32, st.integers(1, 50), elements=st.integers(0, 2**32 - 1)))
def test_rounding_costs_at_most_half_a_unit_and_keeps_what_is_special(bits):
    values = np.concatenate([bits.view(np.float32), np.array(SPECIAL, np.float32)])
    found = _rounded(values)
    normal = np.isfinite(values) & (np.abs(values) >= np.finfo(np.float32).tiny)
    wide = values.astype(np.float64)
    assert (np.abs(found[normal] - wide[normal]) <= 2.0**-11 * np.abs(wide[normal])).all()
    assert (np.isnan(found) == np.isnan(values)).all()
    exact = ~normal & ~np.isnan(values)
    assert (found[exact].view(np.uint32) == values[exact].view(np.uint32)).all(), "0, Inf or a denormal changed"
    assert (_rounded(found).view(np.uint32) == found.view(np.uint32)).all(), "rounding twice changes more"


def one_sequence(**fields: list[float]) -> TokenBatch:
    given = {name: torch.tensor([values], dtype=torch.float32) for name, values in fields.items()}
    return TokenBatch(mask=torch.ones(given["logp_new"].shape, dtype=torch.bool), **given)


def stored_columns(path, batch, names, objective: Objective | str = "mhpo", **options):
    with Recorder(path, objective=objective, fsync=False, tokens="all", **options) as recorder:
        recorder.record(0, batch)
    with open_run(path) as run:
        found = run.sql(f"SELECT {', '.join(names)} FROM tokens ORDER BY position").to_arrow_table()
    return {name: found[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in names}


def close(found, expected, rel) -> bool:
    """Within rel of each value; NaN, ±Inf and the sign of zero as they are."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    odd = ~np.isfinite(expected) | (expected == 0)
    same = (found == expected) & (np.signbit(found) == np.signbit(expected)) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        return bool(np.where(odd, same, np.abs(found - expected) <= np.asarray(rel) * np.abs(expected)).all())


@pytest.mark.parametrize("columns", ["full", "minimal"])
def test_the_compact_tier_keeps_the_stated_accuracy(tmp_path, columns):
    generator = np.random.default_rng(0)
    old = np.concatenate([-generator.exponential(3, 500), SPECIAL[:5], [-1e-40]]).astype(np.float32)
    shift = np.concatenate([generator.normal(0, 1, 500) ** 3, [0.1] * 6])
    entropy = np.concatenate([generator.exponential(1, 500), SPECIAL[:5], [1e-40]])
    batch = one_sequence(
        logp_new=(old + shift).astype(np.float32).tolist(), logp_old=old.tolist(), advantage=[1.0] * len(old),
        logp_rollout=(old - shift).astype(np.float32).tolist(), entropy=entropy.tolist(),
    )  # fmt: skip
    terms = objectives.create("mhpo").terms(batch)
    names = ["log_ratio", "logp_old", "entropy", "hazard"]
    found = stored_columns(tmp_path / "run", batch, [*names, "logp_new", "logp_rollout"], columns=columns,
                           precision="compact")  # fmt: skip
    expected = {
        "log_ratio": terms.log_ratio,
        "hazard": terms.hazard,
        "logp_old": batch.logp_old,
        "entropy": batch.entropy,
    }
    for name in names:
        slack = 3.0 if name == "hazard" and columns == "minimal" else 1.0  # computed from a rounded log-ratio
        assert close(found[name], expected[name][0].numpy(), slack * 5e-4), name
    regular = np.arange(len(old)) < 500
    for name, values in (("logp_new", batch.logp_new), ("logp_rollout", batch.logp_rollout)):
        error = np.abs(found[name] - values[0].numpy())[regular]
        assert (error <= 5e-4 * (np.abs(old) + np.abs(shift))[regular] + 1e-6).all(), name


def test_compact_takes_about_half_the_bytes(tmp_path):
    sizes = {}
    for precision in ("exact", "compact"):
        with Recorder(tmp_path / precision, objective="mhpo", fsync=False, tokens="all", precision=precision) as writer:
            writer.record(0, token_batch(0, 4000))
            writer.record(1, token_batch(1, 4000))
        sizes[precision] = sum(p.stat().st_size for p in (tmp_path / precision / "tokens" / "sealed").iterdir())
    assert sizes["compact"] < 0.7 * sizes["exact"]


SHIFTS = [0.0, -0.0, 1e-6, -1e-6, 0.05, -0.05, 0.3, -0.3, 1.2181, -1.5, 4.0, -4.0, 19.9, -19.9, 21.0, -50.0, 50.0, 88.0,
          89.0, -89.0, 700.0, -700.0, 1e30, -1e30, math.inf, -math.inf, math.nan]  # fmt: skip
DERIVED = ("hazard_positive", "hazard_negative", "modulated_log_ratio", "survival_weight", "gradient_multiplier")


def extreme_batch(**more: list[float]) -> TokenBatch:
    """Every shift with every sign of the advantage, NaN and ±Inf too."""
    advantage = [1.5, -1.5, 0.0, math.nan, math.inf, -math.inf, 1e30]
    pairs = [(shift, a) for shift in SHIFTS for a in advantage]
    return one_sequence(
        logp_new=[shift for shift, _ in pairs], logp_old=[0.0] * len(pairs), advantage=[a for _, a in pairs],
        **{name: values * len(pairs) for name, values in more.items()},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "precision"), [("full", "exact"), ("minimal", "exact"), ("full", "compact"), ("minimal", "compact")]
)
@pytest.mark.parametrize(
    "objective",
    [
        objectives.create("mhpo"), objectives.create("mhpo_lfm_only"), objectives.create("mhpo_dhp_only"),
        objectives.create("mhpo_no_stopgrad"), objectives.create("mhpo_sa"), objectives.create("ppo_clip"),
        objectives.create("mhpo", c=30.0, k_pos=9.0, lambda_pos=0.05, k_neg=0.3, lambda_neg=7.0),
        objectives.create("mhpo_dhp_only", k_pos=0.5, k_neg=0.5, lambda_pos=900.0, lambda_neg=900.0),
        objectives.create("mhpo_sa", c=20.0, k_pos=9.0, lambda_pos=0.01),
        objectives.create("opsm_ppo", base="mhpo"),
    ],
    ids=["mhpo", "lfm", "dhp", "no-stopgrad", "sa", "ppo", "mhpo-steep", "dhp-flat", "sa-steep", "around"],
)  # fmt: skip
def test_derived_columns_are_the_terms_of_the_objective(tmp_path, objective, columns, precision):
    batch = extreme_batch()
    terms = objective.terms(batch)
    names = [*DERIVED, "hazard", "log_ratio"]
    found = stored_columns(tmp_path / "run", batch, names, objective, columns=columns, precision=precision)
    expected = {n: getattr(terms, n) for n in names}
    shift = np.nan_to_num(np.abs(batch.logp_new[0].numpy().astype(np.float64)), posinf=0.0)
    hazard = np.zeros_like(shift) if terms.hazard is None else np.nan_to_num(terms.hazard[0].numpy().astype(np.float64))
    for name in names:
        if expected[name] is None:
            assert np.isnan(found[name]).all(), f"{name} is not one of this objective's terms"
            continue
        value = expected[name][0].numpy().astype(np.float64)
        relative = (1 + 12 * np.minimum(shift, 800) + np.minimum(hazard, 800)) * (
            5e-4 if precision == "compact" else 1e-6
        )
        assert_close(found[name], value, relative, name, batch)


def assert_close(found, expected, relative, name, batch):
    """Exact where the truth is not finite; what a float32 cannot hold is its largest value; underflow may be 0."""
    largest = float(np.finfo(np.float32).max)
    with np.errstate(invalid="ignore"):
        near = np.abs(found - expected) <= relative * np.abs(expected) + 1e-37
        near |= np.isnan(found) & np.isnan(expected)
        near |= (np.abs(expected) > 0.9 * largest) & (np.abs(found) > 0.9 * largest) & (found * expected > 0)
    wrong = np.flatnonzero(~near)
    shown = [(float(batch.logp_new[0, i]), float(batch.advantage[0, i]), found[i], expected[i]) for i in wrong[:6]]
    assert not len(wrong), f"{name}: (log_ratio, advantage, found, expected) {shown}"


@pytest.mark.parametrize("columns", ["full", "minimal"])
def test_the_token_gradient_norm_follows_where_it_is_not_stored(tmp_path, columns):
    for name, more in (("without", {}), ("with", {"sum_p_squared": [0.5]})):
        batch = extreme_batch(**more)
        telemetry_norm = norm_of(batch)
        found = stored_columns(tmp_path / name, batch, ["logit_grad_norm"], columns=columns)["logit_grad_norm"]
        finite = np.isfinite(telemetry_norm)
        assert_close(found[finite], telemetry_norm[finite], 1e-4, "logit_grad_norm", batch)


def norm_of(batch: TokenBatch):
    from mhpo_core.telemetry import logit_gradient_norm

    return logit_gradient_norm(batch, objectives.create("mhpo").terms(batch))[0].numpy().astype(np.float64)


@pytest.mark.parametrize(("columns", "precision"), [("full", "exact"), ("minimal", "exact")])
def test_log_probabilities_come_back_to_the_last_bit(tmp_path, columns, precision):
    generator = np.random.default_rng(1)
    old = np.concatenate([-generator.exponential(3, 2000), SPECIAL * 2])
    new = np.concatenate([-generator.exponential(3, 2000), SPECIAL, SPECIAL[::-1]])
    batch = one_sequence(logp_new=new.tolist(), logp_old=old.tolist(), advantage=[1.0] * len(old))
    found = stored_columns(tmp_path / "run", batch, ["logp_new", "logp_old", "log_ratio"], columns=columns,
                           precision=precision)  # fmt: skip
    log_ratio = objectives.create("mhpo").terms(batch).log_ratio
    for name, values in (("logp_new", batch.logp_new), ("logp_old", batch.logp_old), ("log_ratio", log_ratio)):
        expected = values[0].numpy().astype(np.float64)
        assert close(found[name], expected, 0.0 if columns == "full" or name != "log_ratio" else 1.2e-7), name
