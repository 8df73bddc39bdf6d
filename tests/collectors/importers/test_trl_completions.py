"""TRL's completions: each generation once, and a reward only where the advantages prove it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.importers.trl_completions import FORMAT, _gives_advantages
from tests.collectors.importers.dump_files import DATA, read, read_one, refused

FOLDER = DATA / "trl"


def advantages(reward: np.ndarray, size: int, scale: str) -> np.ndarray:
    """As TRL's grpo_trainer.py makes them, group by group."""
    found: list[float] = []
    for start in range(0, len(reward), size):
        group = reward[start : start + size]
        by = {"group": group.std(ddof=1) + 1e-4, "batch": reward.std(ddof=1) + 1e-4, "none": 1.0}[scale]
        found += ((group - group.mean()) / by).tolist()
    return np.asarray(found, np.float32).astype(float)


def generation(seed=0, size=4, groups=3, weights=(1.0, 1.0), scale="group") -> dict[str, list]:
    rng = np.random.default_rng(seed)
    one, two = rng.normal(size=size * groups), rng.normal(size=size * groups)
    return {
        "prompt": [f"p{i // size}" for i in range(size * groups)],
        "completion": [f"c{i}" for i in range(size * groups)],
        "good": one.tolist(), "short": two.tolist(),
        "advantage": advantages(weights[0] * one + weights[1] * two, size, scale).tolist(),
    }  # fmt: skip


def log(folder: Path, step: int, columns: dict[str, list], told: object = ...) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"completions_{step:05d}.parquet"
    count = len(columns["prompt"])
    pq.write_table(pa.table({"step": [step if told is ... else told] * count, **columns}), path)
    return path


def test_the_sample_of_a_real_run():
    step, notes = read_one(FORMAT, FOLDER / "completions_00001.parquet")
    told = pq.read_table(FOLDER / "completions_00001.parquet").to_pylist()
    assert step.step == 1 and step.batch is None and notes == []
    assert step.sequences.reward == [one["reward_digits"] + one["reward_len"] for one in told]
    # the reward that the trainer itself logged at this step is in trl/on_log_records.json
    assert math.isclose(sum(step.sequences.reward) / 16, -0.18529872596263885, rel_tol=1e-6)
    assert step.sequences.group_id == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert step.sequences.prompt[::4] == ["5+5=", "6+8=", "1+3=", "0+0="] and step.sequences.completion[13] == ""
    assert step.sequences.advantage == [one["advantage"] for one in told]
    assert step.sequences.extra[2] == {"reward_digits": 0.0, "reward_len": -0.4166666567325592}


def test_a_generation_that_is_written_again_is_taken_once_at_its_first_step(tmp_path):
    first, second = generation(0), generation(1)
    for step, columns in {1: first, 2: first, 3: second, 10: second, 11: first}.items():
        log(tmp_path / "completions", step, columns)
    for path in (tmp_path, tmp_path / "completions"):
        steps, notes = read(FORMAT, path)
        assert [one.step for one in steps] == [1, 3, 11] and steps[1].sequences.completion == second["completion"]
        assert notes == ["A generation that is written again is left out, 2 times (first: completions_00002.parquet)."]
    steps, notes = read(FORMAT, FOLDER)  # the folder of the samples holds another table, which is not numbered
    assert [one.step for one in steps] == [1] and len(notes) == 1


def test_a_column_that_log_extra_added_is_no_reward():
    step, notes = read_one(FORMAT, FOLDER / "completions_with_log_extra.parquet")
    told = pq.read_table(FOLDER / "completions_with_log_extra.parquet").to_pylist()
    assert step.sequences.reward == [one["reward_digits"] for one in told] and notes == []
    assert step.sequences.extra[2] == {"reward_digits": 0.0, "reward_spy": None, "n_tok": 4, "prompt_id": "q005"}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_sum_is_the_reward_if_it_gives_the_advantages(tmp_path, scale):
    columns = generation(scale=scale)
    columns = {**columns, "temperature": np.linspace(0, 1, 12).tolist(), "advantage": columns.pop("advantage")}
    step, notes = read_one(FORMAT, log(tmp_path, 1, columns))
    np.testing.assert_allclose(step.sequences.reward, np.add(columns["good"], columns["short"]), rtol=1e-12)
    assert notes == []


def test_with_weights_there_is_no_reward(tmp_path):
    step, notes = read_one(FORMAT, log(tmp_path, 1, generation(weights=(1.0, 0.2))))
    assert step.sequences.reward is None and list(step.sequences.extra[0]) == ["good", "short"]
    assert notes == [
        "No sum of the first columns gives the advantages, no reward is taken (first: completions_00001.parquet)."
    ]


def test_a_generation_that_tells_nothing_takes_the_columns_of_the_one_before(tmp_path):
    flat = generation() | {"good": [1.0] * 12, "short": [0.5] * 12, "advantage": [0.0] * 12}
    step, notes = read_one(FORMAT, log(tmp_path / "flat", 1, flat))
    assert step.sequences.reward is None and len(notes) == 1
    # a second reward that is the same for all: only the generation before tells whether it counts
    constant = generation(weights=(1.0, 0.0)) | {"short": [0.25] * 12}
    assert read_one(FORMAT, log(tmp_path / "constant", 1, constant))[0].sequences.reward is None
    absent = generation(seed=2, weights=(1.0, 0.0)) | {"short": [None] * 12}
    for step_number, columns in enumerate([generation(), absent, flat, constant], 1):
        log(tmp_path / "run", step_number, columns)
    steps, notes = read(FORMAT, tmp_path / "run")
    assert notes == [] and steps[1].sequences.reward == absent["good"]
    assert steps[2].sequences.reward == [1.5] * 12
    np.testing.assert_allclose(steps[3].sequences.reward, np.add(constant["good"], 0.25), rtol=1e-12)


def test_rewards_that_a_function_did_not_give(tmp_path):
    columns = generation(weights=(1.0, 0.0)) | {"short": [None, math.nan] * 6}
    step, _ = read_one(FORMAT, log(tmp_path, 1, columns))
    assert step.sequences.reward == columns["good"]
    del columns["short"]
    columns["good"] = [None, math.nan, 0.5, *columns["good"][3:]]
    step, _ = read_one(FORMAT, log(tmp_path, 1, columns))
    assert step.sequences.reward[:3] == [None, None, 0.5]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=24),
    st.integers(2, 6),
    st.sampled_from(["group", "batch", "none"]),
)
def test_the_proof_holds_for_any_reward_and_fails_for_its_opposite(values, size, scale):
    reward = np.asarray(values[: len(values) // size * size])
    if len(reward) < size:
        return
    told = advantages(reward, size, scale)
    # a neighbour of the same prompt would make one group of two
    rows = [
        {"prompt": i // size, "r": r, "minus": -r, "advantage": a}
        for i, (r, a) in enumerate(zip(reward, told, strict=True))
    ]
    tells = bool((np.abs(told) > 0).any())
    assert _gives_advantages(rows, ["r"]) == tells
    assert not _gives_advantages(rows, ["minus"]) or np.abs(told).max() < 2e-3


def test_chats_and_steps_as_text(tmp_path):
    columns = generation(size=2, groups=1)
    columns["prompt"] = [[{"role": "system", "content": "s"}, {"role": "user", "content": "é"}]] * 2
    columns["completion"] = [[{"role": "assistant", "content": f"c{i}"}] for i in range(2)]
    step, _ = read_one(FORMAT, log(tmp_path, 7, columns, told="8"))
    assert step.step == 8 and step.sequences.completion == ["c0", "c1"] and step.sequences.group_id == [0, 0]
    assert step.sequences.prompt[0] == '[{"role": "system", "content": "s"}, {"role": "user", "content": "é"}]'
    assert read_one(FORMAT, log(tmp_path, 7, columns, told=None))[0].step == 7


def test_the_same_prompt_twice_in_a_row(tmp_path):
    columns = generation() | {"prompt": ["a"] * 8 + ["b"] * 4}
    step, notes = read_one(FORMAT, log(tmp_path, 1, columns))
    np.testing.assert_allclose(step.sequences.reward, np.add(columns["good"], columns["short"]), rtol=1e-12)
    assert step.sequences.group_id == [0] * 8 + [1] * 4 and notes == []


def test_without_groups_there_are_none(tmp_path):
    step, _ = read_one(FORMAT, log(tmp_path, 1, generation(size=2) | {"prompt": list("abcdef")}))
    assert step.sequences.group_id is None


def test_damaged_and_other_files(tmp_path):
    whole = log(tmp_path, 1, generation()).read_bytes()
    (tmp_path / "completions_00002.parquet").write_bytes(whole[:-20])
    (tmp_path / "completions_00003.parquet").write_bytes(b"")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "completions_00004.parquet")
    steps, notes = read(FORMAT, tmp_path)
    assert [one.step for one in steps] == [1]
    assert notes == ["A file cannot be read and is left out, 3 times (first: completions_00002.parquet)."]
    for number in (2, 3, 4):
        file = tmp_path / f"completions_0000{number}.parquet"
        assert FORMAT.find(file) == []
        refused(FORMAT, [file], "is no table of completions that can be read")
    pq.write_table(
        pa.table({n: [1] for n in ("step", "prompt", "completion", "sequence_id")}), tmp_path / "mhpo.parquet"
    )
    assert FORMAT.find(tmp_path / "mhpo.parquet") == [] == FORMAT.find(tmp_path / "nowhere")
