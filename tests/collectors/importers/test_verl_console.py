"""verl's console log: lines of a real run, the samples of rl-insight, and what Ray, tqdm and terminals add."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.importers.steps import Notes
from collectors.importers.verl_console import FORMAT
from tests.collectors.importers.reading import DATA, read, refused, same

VERL = DATA / "verl"
REAL = VERL / "real_verl_steps_142_143_145.log"
RAY = "(TaskRunner pid=7) "
BAR = "Training Progress:  17%|██▋        | 144/870 [1:56:56<9:10:40, 45.51s/it]"


def log(tmp_path, text, name="train.log"):
    (tmp_path / name).write_text(text, newline="")
    return tmp_path / name


def metrics(tmp_path, text):
    steps, notes = read(FORMAT, log(tmp_path, text))
    return [(s.step, s.metrics) for s in steps], notes


def test_a_real_log_comes_back_number_by_number():
    steps, notes = read(FORMAT, REAL)
    assert [s.step for s in steps] == [142, 143, 145] and notes == []
    for found, line in zip(steps, [x for x in REAL.read_text().splitlines() if ") step:" in x], strict=True):
        items = line.split("(TaskRunner pid=1458263)")[1].split(" - ")[1:]
        assert found.metrics == {name: float(value) for name, value in (item.strip().rsplit(":", 1) for item in items)}
    assert [len(s.metrics) for s in steps] == [56, 39, 21]
    assert steps[1].metrics["perf/throughput"] == 364.91629062359056  # a progress bar follows without a space
    assert steps[2].metrics["val-core/openai/gsm8k/acc/mean@1"] == 0.36087945413191813
    assert all(s.batch is None and s.wall_time is None for s in steps)


QUOTED = {
    "critic/score/mean": 0.1,
    "actor/loss": 0.2,
    "critic/rewards/mean": 0.3,
    "response_length/mean": 128.0,
    "actor/grad_norm": 0.99,
}
COUNTED = {"training/global_step": 1.0, "training/epoch": 0.0}


@pytest.mark.parametrize(
    ("name", "step", "expected", "n_notes"),
    [
        # training/global_step is 1 where the bare step is 0
        ("good_minimal_verl.log", 1, COUNTED | QUOTED | {"actor/lr": 1e-6, "actor/entropy": 0.5}, 0),
        ("bad_keys_no_entropy_verl.log", 1, COUNTED | QUOTED | {"actor/lr": 1e-6}, 0),
        ("bad_keys_no_training_step_tokens_verl.log", 1, QUOTED | {"actor/lr": 1e-6, "actor/entropy": 0.5}, 1),
        ("bad_keys_five_legacy_metrics_verl.log", 0, QUOTED, 0),
    ],
)
def test_a_sample_with_metrics_gives_what_it_has(name, step, expected, n_notes):
    (found,), notes = read(FORMAT, VERL / name)
    assert (found.step, found.metrics, len(notes)) == (step, expected, n_notes)


@pytest.mark.parametrize(
    "name", ["bad_keys_startup_only_verl.log", "bad_exist_empty_verl.log", "bad_exist_unbranded.log"]
)
def test_a_log_without_metrics_is_refused(name):
    assert bool(FORMAT.find(VERL / name)) == (name == "bad_keys_startup_only_verl.log")
    refused(FORMAT, [VERL / name], f"{name} holds no metrics of a step, allowed is .*step:N.*Set trainer.logger")


@pytest.mark.parametrize(
    "around",
    [
        RAY + "{}\n",
        "{}\r\n",
        BAR + "\r" + RAY + "{}\n",
        RAY + "{}" + RAY + BAR + "\n",
        "{}" + BAR + "\r\n",
        "\x1b[36m" + RAY + "\x1b[0m{}\x1b[0m\n",
        BAR + RAY + "{}\n",
        "{}100%|███| 870/870\n",
        "{} 17%|██\r",
        "(main_task pid=3, ip=10.0.0.1) {} [repeated 4x across cluster]\n",
    ],
)
def test_prefixes_colours_and_progress_bars_change_nothing(tmp_path, around):
    lines = ["step:9 - actor/loss:-0.25 - actor/lr:1e-06 - perf/x:364.5", "step:10 - actor/loss:0.5 - perf/x:2.0"]
    found, notes = metrics(tmp_path, "".join(around.format(line) for line in lines))
    assert found == [
        (9, {"actor/loss": -0.25, "actor/lr": 1e-6, "perf/x": 364.5}),
        (10, {"actor/loss": 0.5, "perf/x": 2.0}),
    ]
    assert notes == []


def test_two_steps_on_one_line_are_two(tmp_path):
    found, _ = metrics(tmp_path, f"{RAY}step:1 - actor/loss:0.5{RAY}step:2 - actor/loss:0.25\n")
    assert found == [(1, {"actor/loss": 0.5}), (2, {"actor/loss": 0.25})]


VALUES = {
    "np.float64(0.5)": 0.5,
    "np.float32(-1e-3)": -1e-3,
    "np.float64(nan)": math.nan,
    "numpy.int64(3)": 3.0,
    "nan": math.nan,
    "NaN": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-Infinity": -math.inf,
    "tensor(0.25)": 0.25,
    "True": 1.0,
    "tensor(2., device='cuda:0')": 2.0,
    "[0.5]": 0.5,
    "array([7])": 7.0,
    "1e400": math.inf,
    ".5": 0.5,
    "5.": 5.0,
    "+3": 3.0,
}


@pytest.mark.parametrize("written", VALUES)
def test_a_number_is_read_however_it_is_written(tmp_path, written):
    for text in (f"step:1 - actor/x:{written} - actor/y:2\n", f"step=1\n{RAY}'actor/x': {written},\n 'actor/y': 2}}\n"):
        ((step, found),), notes = metrics(tmp_path, RAY + text)
        assert step == 1 and notes == [] and same(found, {"actor/x": VALUES[written], "actor/y": 2.0})


@pytest.mark.parametrize(
    "written", ["tensor([1, 2])", "text", "2026-03-25 13:40", "1:30:00", "10%", "{'a': 1}", "1.2.3"]
)
def test_what_is_no_number_is_noted_and_left_out(tmp_path, written):
    found, notes = metrics(tmp_path, f"{RAY}step:1 - actor/x:{written} - actor/y:2\n")
    assert found == [(1, {"actor/y": 2.0})]
    assert len(notes) == 1 and notes[0].startswith(
        "A part of a step's line is no number and is left out (first: line 1 of"
    )


def test_none_is_unknown(tmp_path):
    assert metrics(tmp_path, f"{RAY}step:1 - actor/x:None - actor/y:2\n") == ([(1, {"actor/y": 2.0})], [])


def test_other_text_is_no_metric(tmp_path):
    noise = [
        "timing_s/step:43.1 - x:1",
        "training/global_step:99 - x:1",
        "'eos_token_id': 151643",
        "{'actor/lr': 1.0}",
        "my-step:7 - x:1",
        "{'lr': 1, 'step': 3}",
        "('Initial validation metrics: {\"val-core/x\": 0.5}')",
        "step:",
        "step:8",
    ]
    text = "\n".join([*noise, "step:1 - actor/y:2", *noise, "step:2 - actor/y:3", *noise]) + "\n"
    assert metrics(tmp_path, RAY + text) == ([(1, {"actor/y": 2.0}), (2, {"actor/y": 3.0})], [])


def test_the_value_at_the_end_of_a_cut_log_is_not_trusted(tmp_path):
    whole = f"{RAY}step:1 - actor/x:0.125 - actor/y:0.125\n"
    found, notes = metrics(tmp_path, whole + f"{RAY}step:2 - actor/x:0.5 - actor/y:0.1")
    assert found == [(1, {"actor/x": 0.125, "actor/y": 0.125}), (2, {"actor/x": 0.5})]
    assert notes == ["The last line is cut off; its last value is left out (first: line 2 of train.log)."]
    found, notes = metrics(tmp_path, f"step=1 - training/global_step:4\n{RAY}'actor/x': 0.5\n{RAY}'actor/y': 0.1")
    assert found == [(4, {"training/global_step": 4.0, "actor/x": 0.5})] and len(notes) == 1


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 4605))
def test_a_log_cut_anywhere_gives_no_wrong_number(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "x.log"
    path.write_bytes(REAL.read_bytes()[:cut])
    whole = {s.step: s.metrics for s in FORMAT.steps([REAL], Notes())}
    try:
        for found in FORMAT.steps([path], Notes()):
            assert found.metrics.items() <= whole[found.step].items()
    except Exception as error:
        assert "holds no metrics of a step" in str(error)


def test_a_restart_is_another_attempt(tmp_path):
    lines = "".join(f"{RAY}step:{n} - actor/x:{x}\n" for n, x in ((1, 1), (2, 2), (3, 3), (2, 4), (3, 5)))
    assert [(n, m["actor/x"]) for n, m in metrics(tmp_path, lines)[0]] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (2, 4.0),
        (3, 5.0),
    ]


def test_logs_of_a_folder_follow_one_another_by_number(tmp_path):
    for n in (10, 2, 1):
        log(tmp_path, f"{RAY}step:{n} - actor/x:{n}\n" if n != 2 else f"{RAY} only begins\n", f"train_{n}.log")
    log(tmp_path, f"{RAY}step:5 - actor/x:5\n", "notes.md")
    log(tmp_path, "another log\n", "other.log")
    assert [p.name for p in FORMAT.find(tmp_path)] == ["train_1.log", "train_2.log", "train_10.log"]
    steps, notes = read(FORMAT, tmp_path)
    assert [s.step for s in steps] == [1, 10] and notes == ["A log holds no metrics of a step (first: train_2.log)."]


def test_other_formats_are_left_alone(tmp_path):
    for name, text in {
        "a.jsonl": '{"text": "verl.trainer step:1 - actor/x:1"}',
        "b.json": '[{"a": "(TaskRunner pid=1)"}]',
        "c.csv": "step,actor/x\n1,2\n",
        "d.txt": "step: 5 - loss: 0.5\n",
        "e.log": "epoch 1 step 2 loss 3\n",
        "f.bin": "verl.trainer\x00\x00",
        "g.log": "step:1 - loss:0.5\n",
    }.items():
        assert FORMAT.find(log(tmp_path, text, name)) == [], name
    assert FORMAT.find(VERL / "file_logger" / "proj" / "exp.jsonl") == FORMAT.find(tmp_path / "absent") == []


def test_other_encodings_and_odd_bytes_are_read(tmp_path):
    text = f"{RAY}step:1 - actor/x:0.5\n"
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "x.log").write_text(text, encoding=encoding)
        assert read(FORMAT, tmp_path / "x.log")[0][0].metrics == {"actor/x": 0.5}
    (tmp_path / "x.log").write_bytes(b"caf\xe9\n" + text.encode())
    steps, notes = read(FORMAT, tmp_path / "x.log")
    assert steps[0].metrics == {"actor/x": 0.5} and re.match("Bytes that are not UTF-8", notes[0])


@pytest.mark.parametrize(
    "piece", ["step:1 - ", " ", "9", "a", ":", "- ", "'a/", "(", "\x1b[", "step=1", " - a/b:", "1.", "np."]
)
def test_a_long_hostile_line_is_read_in_linear_time(tmp_path, piece):
    long = piece * 60_000
    text = f"{RAY}step:1 - actor/x:1\n{RAY}step=2 - actor/x:2\nx{long}!\n{RAY}step:3 - a/b:{long}!\nstep:4 - {long}!\n"
    found, _ = metrics(tmp_path, text)  # quadratic takes minutes
    assert found[0] == (1, {"actor/x": 1.0})
