"""Every page's logic through Streamlit's own AppTest."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from app import session
from app.settings import RUN_VARIABLE, RUNS_VARIABLE
from app.theme import PALETTES
from collectors import Recorder
from mhpo_core import TokenBatch
from tests.app.runs import record_run, token_batch

APP = Path(session.__file__).parent
PAGES = sorted(p.name for p in (APP / "app_pages").glob("[a-z]*.py"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path))
    monkeypatch.setenv(RUN_VARIABLE, "")
    session.close_followers()
    return tmp_path


def open_page(name: str = "live.py") -> AppTest:
    test = AppTest.from_file(str(APP / "home.py"), default_timeout=60).run()
    if name != "live.py":
        test.switch_page(f"app_pages/{name}").run()
    assert not test.exception, test.exception
    return test


def payload(test: AppTest) -> dict[str, Any]:
    return json.loads(json.loads(test.get("bidi_component")[0].proto.json)["payload"])


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("n_steps", [0, 1, 40])
def test_every_page_opens(page: str, n_steps: int, folder: Path) -> None:
    record_run(folder / "run", n_steps)
    open_page(page)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_explains_an_empty_folder(page: str) -> None:
    told = " ".join(element.value for element in open_page(page).text)
    assert "No run" in told or "Looking in" in told


@pytest.mark.parametrize("page", PAGES)
def test_every_page_lives_with_damaged_runs(page: str, folder: Path) -> None:
    record_run(folder / "run", 3)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "run.json").write_text("no json")
    next((folder / "run" / "rollup" / "sealed").glob("*.parquet")).write_bytes(b"PAR1 torn")
    open_page(page)


def test_the_newest_run_comes_first(folder: Path) -> None:
    for name in ("first", "second"):
        record_run(folder / name, 2)
    test = open_page()
    assert test.selectbox(key="run").options == ["second", "first"]
    assert payload(test)["run"] == "second"
    test.selectbox(key="run").set_value("first").run()
    assert payload(test)["run"] == "first"


def test_the_windows_show_their_steps(folder: Path) -> None:
    record_run(folder / "run", 300)
    test = open_page()
    assert payload(test)["window"] == "all" and payload(test)["step"] == 299
    test.segmented_control(key="steps").set_value("Last 250").run()
    assert payload(test)["window"] == "250"


def test_nan_everywhere(folder: Path) -> None:
    batch = token_batch(0)
    nan = batch.logp_old * float("nan")
    with Recorder(folder / "run", objective="mhpo") as recorder:
        for step in range(3):
            broken = TokenBatch(
                logp_new=nan, logp_old=nan, advantage=nan, mask=batch.mask, entropy=nan, logp_rollout=nan
            )
            recorder.record(step, broken, loss=float("nan"), grad_norm=float("inf"), gradient_norms={"a": float("nan")})
    shown = payload(open_page())
    tiles = {t["name"]: t for t in shown["tiles"]}
    assert tiles["nonfinite"]["value"] == str(int(batch.mask.sum())) and tiles["nonfinite"]["level"] == "critical"
    assert tiles["grad_norm"]["value"] == "inf"
    assert any("NaN or ±Inf" in t["name"] for t in shown["figure"]["data"])


def test_a_run_deleted_while_it_is_open(folder: Path) -> None:
    record_run(folder / "run", 2)
    test = open_page()
    shutil.rmtree(folder / "run")
    test.run()
    assert not test.exception
    assert "Looking in" in test.text[0].value


def test_the_run_the_server_was_started_for_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_VARIABLE, "soon")
    shown = payload(open_page())
    assert shown["state"] == "waiting" and "soon" in shown["banner"] and shown["figure"] is None


def test_a_refresh_builds_nothing_when_nothing_changed(folder: Path) -> None:
    record_run(folder / "run", 3)
    follower = session.follow("run")
    first = follower.payload("all")
    assert follower.payload("all") is first
    assert json.loads(first)["palettes"] == PALETTES


def test_a_name_cannot_leave_the_folder(folder: Path) -> None:
    record_run(folder / "runs" / "inside", 1)
    record_run(folder / "outside", 1)
    shown = json.loads(session.follow("../../outside/../outside").payload("all"))
    assert shown["run"] in ("", "outside")
    assert "waiting" in json.loads(session.follow("/etc").payload("all"))["state"]


def test_data_is_called_stale_while_the_writer_lives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.live.STALE_SECONDS", 0.2)
    with Recorder(folder / "run", objective="mhpo") as recorder:
        recorder.record(0, token_batch(0))
        follower = session.follow("run")
        give_up = time.monotonic() + 40
        while (shown := json.loads(follower.payload("all")))["level"] != "warning":
            assert time.monotonic() < give_up, (shown["level"], shown["state"], shown["banner"], shown["step"])
            time.sleep(0.05)
        shown = json.loads(follower.payload("all"))
        assert shown["state"] == "running" and "No new step for a while" in shown["banner"]
        recorder.record(1, token_batch(1))
        while json.loads(follower.payload("all"))["step"] != 1:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        assert json.loads(follower.payload("all"))["level"] == "ok"
    assert json.loads(follower.payload("all"))["state"] == "finished"


@pytest.mark.parametrize(("end", "state"), [("stopped", "stopped"), ("failed", "failed"), ("finished", "finished")])
def test_the_page_says_how_a_run_ended(folder: Path, end: str, state: str) -> None:
    recorder = Recorder(folder / "run", objective="mhpo")
    recorder.record(0, token_batch(0))
    recorder.close(end, "because <b>of this</b>")
    shown = json.loads(session.follow("run").payload("all"))
    assert shown["state"] == state
    assert shown["banner"] and (end == "finished" or "because <b>of this</b>" in shown["banner"])


def exploding(path: Path, n_steps: int = 24) -> None:
    """A run whose gradient explodes at step 15, watched live; one layer's name is hostile."""
    with Recorder(path, objective="mhpo") as recorder:
        for step in range(n_steps):
            norm = (1 + 0.1 * (step % 3)) * (1000 if step >= 15 else 1)
            batch = token_batch(step, 3.0 if step >= 15 else 0.1)
            recorder.record(step, batch, grad_norm=norm, gradient_norms={"<b onclick=x()>layer": norm, "head": 1.0})


def test_an_alarm_is_on_every_page(folder: Path) -> None:
    exploding(folder / "run")
    assert payload(open_page())["level"] == "critical"
    assert payload(open_page())["banner"].startswith("Alarm at step 1")
    assert open_page("runs.py").dataframe[0].value["health"][0].startswith("critical at 1")
    page = open_page("alarms.py")
    assert "24 steps judged: " in page.text[0].value and " critical" in page.text[0].value
    first = page.expander[0]
    assert first.label.startswith("Step 1") and first.proto.expanded
    shown = " ".join(text.value for text in first.text)
    assert "Last step before the first sign" in " ".join(c.value for c in first.caption) and "14" in shown
    signs = first.dataframe[0].value
    assert list(signs["from step"]) == sorted(signs["from step"]) and signs["from step"][0] == 15
    layers = next(d.value for d in first.dataframe if "layer" in d.value)
    assert layers["layer"][0] == "<b onclick=x()>layer", "shown as text, in a table that makes no HTML of it"


def test_a_page_of_alarms_follows_a_run(folder: Path) -> None:
    exploding(folder / "run", n_steps=12)
    page = open_page("alarms.py")
    assert page.text[0].value == "12 steps judged: 0 critical, 0 warnings."
    shutil.rmtree(folder / "run")
    exploding(folder / "run")
    assert session.incidents_of("run").steps in (12, 24)
    session.close_followers()
    assert session.incidents_of("run").steps == 24


def test_the_page_says_how_often_the_alarms_are_right(folder: Path) -> None:
    record_run(folder / "run", 2)
    about = open_page("alarms.py").expander[-1]
    assert about.label.startswith("About the alarms") and about.text
