"""Names and texts are data: hostile ones come back, or are replaced as documented, and never change a query."""

from __future__ import annotations

import pytest

from collectors import Recorder, open_run, policy
from collectors.listing import list_runs
from collectors.tail import RunTail
from mhpo_core import Sequences
from tests.collectors.support import column, new_recorder, record_steps, rows, token_batch

HOSTILE = [
    "it's \"quoted\" -- ; DROP TABLE steps", "two\nlines\r\n\ttab", "NUL \x00 inside", "\u202eevil\u202c עברית", "",
    "<script>alert(1)</script>", "👩‍👩‍👧 e\u0301 \ufffd \u2028", "a" * 1_000_000,
]  # fmt: skip
BROKEN = [("half \ud83d of a pair", "half ? of a pair"), ("\udcff", "?")]
FOLDERS = [
    "plain", "it's", 'a "b"', "with space", "日本-é", "run[1]*?'", "run*", "[!a]", "[a-z]", "{a,b}", "x\\y", "lr=3e-6",
    "step=77", "two\nlines", "%41", "#?&", "-rf", "$(HOME)", "file:x", "s3", "\u202ertl",
]  # fmt: skip


@pytest.mark.parametrize("tokens", ["all", "flight"])
def test_hostile_texts_round_trip(tmp_path, monkeypatch, tokens):
    """With "flight" some texts lie in the ring, apart from their sequences."""
    monkeypatch.setattr(policy, "TAIL_TEXTS", 0)
    texts = HOSTILE + [given for given, _ in BROKEN]
    expected = HOSTILE + [stored for _, stored in BROKEN]
    vocabulary = dict(enumerate(texts[:-3] + texts[-2:]))
    with new_recorder(tmp_path / "run", vocabulary=vocabulary, tokens=tokens) as recorder:
        batch = token_batch(0, n_sequences=len(texts))
        recorder.record(0, batch, sequences=Sequences(prompt=texts, completion=texts[::-1]))
        names = {text: float(i) for i, text in enumerate(texts)}
        recorder.record(1, token_batch(1), metrics=names, gradient_norms=names)
        for text in texts:
            recorder.event("note", text)
    with open_run(tmp_path / "run") as run:
        assert rows(run, "SELECT prompt, completion FROM sequences WHERE step = 0 ORDER BY sequence_id") == list(
            zip(expected, expected[::-1], strict=True)
        )
        assert (column(run, "SELECT count(*) FROM raw_texts") == [0]) == (tokens == "all")
        assert sorted(column(run, "SELECT name FROM metrics")) == sorted(expected)
        assert sorted(column(run, "SELECT parameter FROM gradients")) == sorted(expected)
        assert column(run, "SELECT detail FROM events WHERE kind = 'note'") == expected
        assert column(run, "SELECT token FROM vocabulary ORDER BY token_id") == expected[:-3] + expected[-2:]


def test_a_hostile_config_is_stored_or_refused_in_one_line(tmp_path):
    config = {"text": 'it\'s "x" \x00 \ud83d', "nan": float("nan"), "日本": [1, None, True]}
    with Recorder(tmp_path / "run", objective="mhpo", config=config):
        pass
    with open_run(tmp_path / "run") as run:
        stored = run.manifest["config"]
    assert stored["text"] == 'it\'s "x" \x00 ?' and stored["日本"] == [1, None, True] and stored["nan"] != stored["nan"]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """Folders with every name side by side: a wildcard in one would match its neighbours."""
    folder = tmp_path_factory.mktemp("runs")
    for i, name in enumerate(FOLDERS):
        record_steps(folder / name, range(100 * i, 100 * i + 2), vocabulary={1: name})
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_name_works_everywhere(crowd, name):
    steps = [100 * FOLDERS.index(name) + i for i in range(2)]
    with open_run(crowd / name) as run:
        assert rows(run, "SELECT step, lr FROM steps") == [(s, None) for s in steps]
        assert column(run, "SELECT DISTINCT step FROM tokens ORDER BY 1") == steps
        assert column(run, "SELECT DISTINCT step FROM sequences ORDER BY 1") == steps
        assert column(run, "SELECT kind FROM events") == ["started", "finished"]
        assert column(run, "SELECT token FROM vocabulary") == [name]
        assert column(run, "SELECT DISTINCT grad_norm FROM gradients ORDER BY 1") == [s + 0.5 for s in steps]
    tail = RunTail(crowd / name, ["lr", "loss"])
    tail.poll()
    assert (tail.n_steps, tail.last.step, tail.last.metrics["lr"], tail.state.name) == (2, steps[-1], None, "finished")
    tail.close()


def test_all_of_them_are_listed_with_their_own_numbers(crowd):
    listed = {s.run_id: (s.state.name, s.health, s.last_step, s.problem) for s in list_runs(crowd)}
    assert listed == {name: ("finished", "ok", 100 * i + 1, "") for i, name in enumerate(FOLDERS)}
