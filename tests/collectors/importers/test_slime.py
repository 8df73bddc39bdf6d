"""slime's dumps of training data; a pickle that wants more than data is refused."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from collectors.importers import slime
from collectors.importers.slime import FORMAT
from tests.collectors.importers.dump_files import DATA, read, read_one, refused, trained

SAMPLE = DATA / "slime" / "train_data" / "5.pt"


def sample(index=0, **given) -> dict:
    found = {
        "data_parallel_rank": 0, "sample_index": index, "rollout_position": index, "tokens": torch.tensor([1, 2, 3, 4]),
        "response_lengths": 2, "total_lengths": 4, "loss_masks": torch.tensor([1, 1], dtype=torch.int32),
        "rewards": 0.5, "truncated": 0, "rollout_log_probs": torch.tensor([-1.0, -2.0]),
        "log_probs": torch.tensor([-1.5, -2.5]), "advantages": torch.tensor([0.5, 0.5]),
    }  # fmt: skip
    return {name: value for name, value in (found | given).items() if value is not ...}


def dump(folder: Path, samples: list, rollout=3, raw_reward=..., name: str | None = None, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    payload = {"format_version": 2, "rollout_id": rollout, "rank": 0, "samples": samples, "dp_shards": [], **more}
    if raw_reward is not ...:
        payload["raw_reward"] = raw_reward
    path = folder / (name or f"{rollout}.pt")
    torch.save(payload, path)
    return path


def test_the_sample_gives_the_tokens_of_every_response():
    told = torch.load(SAMPLE, weights_only=True)
    for path in (SAMPLE, SAMPLE.parent, SAMPLE.parent.parent):
        step, notes = read_one(FORMAT, path)
        assert step.step == 5 and not step.ratio_known and notes == []
        assert step.batch.n_sequences == 4 and step.batch.mask.sum() == 4 + 6 + 6 + 4
        fields = {
            "logp_old": "log_probs", "logp_new": "log_probs", "logp_rollout": "rollout_log_probs",
            "advantage": "advantages",
        }  # fmt: skip
        for ours, theirs in fields.items():
            assert trained(step, ours) == [one[theirs].tolist() for one in told["samples"]], ours
        assert trained(step, "token_id")[0] == [27, 30, 33, 31] and trained(step, "token_id")[3] == [35, 22, 30, 13]
        assert step.sequences.reward == [1.0, 0.0, 1.0, 0.0] and step.sequences.truncated == [True, False, False, True]
        assert step.sequences.group_id is None and step.batch.entropy is None and step.batch.logp_ref is None
        assert step.sequences.extra[1] == {
            "data_parallel_rank": 1, "sample_index": 1, "rollout_position": 1, "rewards": 0.5,
        }  # fmt: skip


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_runs(tmp_path):
    marker = tmp_path / "executed"
    dump(tmp_path / "train_data", [sample()], rollout=1)
    evil = dump(tmp_path / "train_data", [sample(metadata=Evil(marker))], rollout=2)
    refused(FORMAT, FORMAT.find(evil), "is refused and nothing in it was run")
    refused(FORMAT, FORMAT.find(tmp_path), "is refused")  # and not left out as if it were damaged
    assert not marker.exists()
    torch.load(evil, weights_only=False)
    assert marker.exists()  # it would have run


def test_an_archive_bomb_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    path = dump(tmp_path, [sample(tokens=torch.zeros(1 << 20, dtype=torch.int64))])
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("was loaded"))
    packed = tmp_path / "7.pt"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small:
        for entry in whole.infolist():
            small.writestr(entry.filename, whole.read(entry))
    assert packed.stat().st_size < 20_000
    refused(FORMAT, FORMAT.find(packed), r"says that it holds 8,389,430, allowed are files that are not compressed")
    monkeypatch.setattr(slime, "LARGEST", 1 << 20)
    refused(FORMAT, [path], "allowed are files that are not compressed, to 1,048,576 bytes")


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    huge = torch.zeros(1).expand(1 << 40)
    refused(FORMAT, [dump(tmp_path, [sample(log_probs=huge)])], "tensors that claim 4,398,046,511,")
    shared = torch.zeros(1 << 20)
    samples = [sample(i, log_probs=shared) for i in range(32)]
    refused(FORMAT, [dump(tmp_path, samples)], "tensors that claim")


def test_rollouts_come_by_number(tmp_path):
    for rollout in (10, 9, 2):
        dump(tmp_path / "train_data", [sample()], rollout)
        dump(tmp_path / "rollout_data", [{"index": 0}], rollout)
    assert [one.step for one in read(FORMAT, tmp_path)[0]] == [2, 9, 10]
    assert read_one(FORMAT, dump(tmp_path, [sample()], rollout=None, name="12_0.pt"))[0].step == 12
    refused(FORMAT, [dump(tmp_path, [sample()], rollout=None, name="none.pt")], "tells no rollout_id")


def test_groups_are_equal_prompts_and_rewards_those_of_the_verifier(tmp_path):
    other = torch.tensor([1, 9, 3, 4])
    samples = [sample(0), sample(1, tokens=other), sample(2), sample(3, rollout_position=...)]
    step, _ = read_one(FORMAT, dump(tmp_path, samples, raw_reward=[1.0, None, float("nan"), 4.0]))
    assert step.sequences.group_id == [0, 1, 0, 0] and str(step.sequences.reward) == "[1.0, None, nan, None]"
    short = [sample(i, tokens=torch.tensor([1, 5 + i, 6])) for i in range(2)]  # one token of prompt, two of response
    assert read_one(FORMAT, dump(tmp_path, short))[0].sequences.group_id == [0, 0]
    step, _ = read_one(FORMAT, dump(tmp_path, samples[:2]))
    assert step.sequences.reward is None and step.sequences.group_id is None
    assert step.sequences.extra[0]["rewards"] == 0.5


def test_masks_dtypes_and_optional_fields(tmp_path):
    half = torch.tensor([-0.5, -0.25], dtype=torch.bfloat16)
    samples = [
        sample(0, loss_masks=torch.tensor([0, 1]), log_probs=half, entropy=half.abs(), ref_log_probs=half),
        sample(1, advantages=torch.tensor([1e300, 0.5], dtype=torch.float64), entropy=half, ref_log_probs=half),
    ]
    step, notes = read_one(FORMAT, dump(tmp_path, samples))
    assert trained(step, "token_id") == [[4], [3, 4]] and trained(step, "logp_old") == [[-0.25], [-1.5, -2.5]]
    assert trained(step, "entropy") == [[0.25], [-0.5, -0.25]] and trained(step, "logp_ref") == [[-0.25], [-0.5, -0.25]]
    assert trained(step, "advantage") == [[0.5], [1e300, 0.5]] and notes == []
    assert step.batch.logp_old.dtype == torch.float32


def test_odd_samples_cost_their_tokens_alone(tmp_path):
    samples = [
        sample(0), sample(1, log_probs=torch.tensor([-1.0])), sample(2, loss_masks=...), sample(3, tokens=...), "text",
        sample(4, advantages=torch.zeros(2, 2)), sample(5, log_probs=torch.eye(2).to_sparse()),
        sample(6, truncated=...), sample(7, log_probs=[-1.0, None]),
        sample(8, rollout_log_probs=torch.tensor([1 + 1j, 0])),
    ]  # fmt: skip
    step, notes = read_one(FORMAT, dump(tmp_path, samples))
    assert step.batch.mask.sum(1).tolist() == [2, 0, 0, 2, 0, 0, 2, 1, 2]
    assert step.batch.token_id is None and step.batch.logp_rollout is None and step.sequences.truncated is None
    assert sorted(note.split(" (")[0] for note in notes) == [
        "A sample is no dictionary and is left out",
        "A sequence lacks a per-token array, its tokens are left out, 3 times",
        "A step has logp_rollout for some of its sequences only, it is left out",
        "A step has token_id for some of its sequences only, it is left out",
        "A token that lacks a number is left out",
        "Only some samples tell whether they were truncated, none is said to be",
        "Per-token arrays of a sequence have different lengths, its tokens are left out",
    ]


def test_damaged_and_other_files(tmp_path):
    whole = dump(tmp_path / "train_data", [sample()], 1).read_bytes()
    (tmp_path / "train_data" / "2.pt").write_bytes(whole[:-200])
    (tmp_path / "train_data" / "3.pt").write_bytes(b"")
    steps, notes = read(FORMAT, tmp_path)
    assert [one.step for one in steps] == [1]
    assert notes == ["A file cannot be read and is left out, 2 times (first: 2.pt)."]
    for name in ("2.pt", "3.pt", "none.pt"):
        assert FORMAT.find(tmp_path / "train_data" / name) == []
        refused(FORMAT, [tmp_path / "train_data" / name], "is no archive of torch")
    torch.save({"model": torch.zeros(3)}, tmp_path / "4.pt")
    assert FORMAT.find(tmp_path / "4.pt") == []
    refused(FORMAT, [tmp_path / "4.pt"], "holds no samples")
    torch.save([1], tmp_path / "4.pt", _use_new_zipfile_serialization=False)
    refused(FORMAT, [tmp_path / "4.pt"], "is no archive of torch")


@pytest.mark.parametrize("cut", [1, 50, 1000, 2000])
def test_a_pickle_that_is_cut_short(tmp_path, cut):
    with zipfile.ZipFile(SAMPLE) as whole, zipfile.ZipFile(tmp_path / "5.pt", "w", zipfile.ZIP_STORED) as short:
        for entry in whole.infolist():
            data = whole.read(entry)
            short.writestr(entry.filename, data[:-cut] if entry.filename.endswith("data.pkl") else data)
    refused(FORMAT, [tmp_path / "5.pt"], "cannot be read|is refused")


def test_flipped_bytes_never_raise_anything_else(tmp_path):
    whole = bytearray(SAMPLE.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = whole.copy()
        damaged[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        (tmp_path / "5.pt").write_bytes(damaged)
        try:
            for file in FORMAT.find(tmp_path / "5.pt"):
                list(FORMAT.steps([file], slime.Notes()))
        except slime.StoreError as error:
            assert "\n" not in str(error)
