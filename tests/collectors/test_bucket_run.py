"""A whole run on a bucket: recorded, resumed, rewound, followed, checked, queried; with the answers of a folder."""

from __future__ import annotations

import pytest

from collectors import Recorder, StoreError, open_run
from collectors.compaction import compact
from collectors.integrity import verify
from collectors.state import run_state
from collectors.storage import open_storage
from collectors.tail import RunTail
from tests.collectors import s3
from tests.collectors.support import column, record_steps, rows, token_batch

TABLES = ("steps_all", "tokens", "sequences", "gradients", "metrics", "histograms")


@pytest.fixture(scope="module")
def url():
    with s3.bucket(folder="runs/mine") as found:
        yield found


def answers(place):
    found = {}
    with open_run(place) as run:
        for table in TABLES:
            own = " EXCLUDE (wall_time, recorder_ms)" if table == "steps_all" else ""
            found[table] = sorted(map(repr, run.sql(f"SELECT *{own} FROM {table}").fetchall()))
    return found


def test_a_run_on_a_bucket_is_the_run_in_a_folder(url, tmp_path):
    for place in (url, tmp_path / "run"):
        record_steps(place, [0, 1, 2])
        record_steps(place, [3, 2, 3], vocabulary={1: "one"})
    assert answers(url) == answers(tmp_path / "run")
    with open_run(url) as run:
        assert rows(run, "SELECT step, attempt FROM steps") == [(0, 0), (1, 0), (2, 1), (3, 1)]
        assert column(run, "SELECT kind FROM events") == ["started", "finished", "resumed", "rewound", "finished"]
        one = run.tokens_of(3, column(run, "SELECT sequence_id FROM tokens WHERE step = 3 LIMIT 1")[0])
        assert one.num_rows and run.path == url
        with run.console() as console:
            assert console.query("SELECT count(*) AS n FROM tokens").to_pylist()[0]["n"] > one.num_rows
    tail = RunTail(open_storage(url), ["loss"])
    tail.poll()
    assert (tail.n_steps, tail.last.step, tail.state.name) == (4, 3, "finished")
    assert verify(open_storage(url)).findings == []
    before = answers(url)
    done = compact(open_storage(url), wait=0.0)
    assert done.files_after < done.files_before and answers(url) == before


def test_what_a_bucket_cannot_tell(url):
    place = url.replace("mine", "other")
    with pytest.raises(StoreError, match="launch=") as raised:
        Recorder(place, objective="mhpo", rank=0, world_size=2)
    assert "\n" not in str(raised.value)
    with Recorder(place, objective="mhpo", tokens="flight:2", rank=0, world_size=1) as recorder:
        for step in range(5):
            recorder.record(step, token_batch(step, 40))
        recorder.pin("the test asks")
        assert recorder.flush(30)
        assert run_state(open_storage(place)).name == "running"
    with open_run(place) as run:
        assert column(run, "SELECT DISTINCT step FROM tokens WHERE kept_because = 'pinned' ORDER BY 1") == [3, 4]
        assert column(run, "SELECT count(*) FROM steps") == [5]
