"""Messages about alarms: one per incident, to a real server; none can slow or fail a run; no address leaks."""

from __future__ import annotations

import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from collectors import notify, open_run
from collectors.state import run_state
from collectors.storage import LocalStorage
from mhpo_core.errors import ConfigError
from tests.collectors.support import new_recorder, rows
from tests.collectors.test_alarms import STEPS, record, record_all
from tests.collectors.webhook import SECRET, nobody, webhook

installed = pytest.mark.skipif(
    find_spec("apprise") is None, reason="apprise is not installed; `make test` installs it (pip install -e '.[test]')"
)


def said(run: Path) -> list[tuple[str, str]]:
    return [row for row in rows(run, "SELECT kind, detail FROM events") if row[0] not in ("started", "pinned")]


@installed
def test_an_incident_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    with webhook() as server:
        monkeypatch.setenv(notify.VARIABLE, f"  {server.address}\n")
        critical = [a for a in record_all(tmp_path / "odd 'name'") if a.severity == "critical"][0]
    (message,) = server.messages
    assert message["title"] == f"Critical alarm in odd 'name' at step {critical.step}"
    assert critical.message in message["message"] and "Last step before the first sign: " in message["message"]
    assert said(tmp_path / "odd 'name'") == [("notified", f"{critical.id}: 1 address"), ("finished", "")]
    assert SECRET not in caplog.text and f":{server.server.server_port}" not in caplog.text
    with open_run(tmp_path / "odd 'name'") as run:
        stored = " ".join(repr(run.sql(f"FROM {t}").fetchall()) for t in ("events", "alarms"))
    for text in (stored, (tmp_path / "odd 'name'" / "run.json").read_text("utf-8")):
        assert "json://" not in text and SECRET not in text


@installed
@pytest.mark.parametrize("how", ["fails", "refuses", "hangs"])
def test_a_server_that_does_not_take_it_is_an_event(tmp_path: Path, monkeypatch, caplog, how: str) -> None:
    with webhook(how) as server:
        address = nobody() if how == "refuses" else server.address
        monkeypatch.setenv(notify.VARIABLE, f"{address}?rto=0.5")
        record_all(tmp_path / "run")
    (kind, detail), ended = said(tmp_path / "run")
    assert kind == "notification_failed" and detail.endswith(": address 1 of 1 did not take it")
    assert ended == ("finished", "") and SECRET not in caplog.text


@installed
def test_training_does_not_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with webhook("hangs") as server:
        monkeypatch.setenv(notify.VARIABLE, f"{server.address}?rto=1")
        with new_recorder(tmp_path / "run") as writer:
            for step in range(STEPS):
                record(writer, step)
            assert server.asked.wait(20)
            began = time.monotonic()
            for step in range(STEPS, STEPS + 3):
                record(writer, step)
            assert writer.flush(20) and time.monotonic() - began < 0.8, "stored while the server hangs"


@installed
def test_a_recording_that_ends_waits_a_little_and_not_for_ever(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(notify.Notifier.finish, "__defaults__", (0.3,))
    with webhook("hangs") as server:
        monkeypatch.setenv(notify.VARIABLE, server.address)
        record_all(tmp_path / "run")
        assert said(tmp_path / "run")[0][1].endswith("no answer when the recording ended")
        assert server.asked.wait(20), "it is on its way all the same"


@installed
def test_an_answer_that_never_ends_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with webhook("drips") as server, webhook() as other:
        monkeypatch.setenv(notify.VARIABLE, f"{server.address} {other.address} nonsense://{SECRET}")
        outcome = notify.deliver("title", "body", seconds=2.0)
    assert [m["message"] for m in other.messages] == ["body"]
    assert outcome.event("x") == (
        "notification_failed",
        "x: address 1 of 3 did not answer in time; address 3 of 3 is none that apprise knows",
    )


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(notify, "_unready", lambda: "")
    monkeypatch.setattr(notify, "_PROCESS", tmp_path / "hangs.py")
    monkeypatch.setattr(notify, "_STARTING_SECONDS", 0.2)
    assert notify.deliver("title", "body", 0.1).problem == "no answer within 0.3 seconds"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    assert "FileNotFoundError" in notify.deliver("title", "body", 0.1).problem


def test_without_the_package_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(notify, "find_spec", lambda name: None)
    monkeypatch.setenv(notify.VARIABLE, f"json://127.0.0.1/{SECRET}")
    record_all(tmp_path / "run")
    assert caplog.text.count("pip install 'mhpo[notify]'") == 1 and SECRET not in caplog.text
    assert "pip install 'mhpo[notify]'" in said(tmp_path / "run")[0][1]
    with pytest.raises(ConfigError, match="pip install"):
        notify.require_ready()
    monkeypatch.setenv(notify.VARIABLE, " ")
    with pytest.raises(ConfigError, match="MHPO_NOTIFY is not set"):
        notify.require_ready()


def test_nothing_is_sent_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notify.VARIABLE, raising=False)
    monkeypatch.setattr(notify, "deliver", lambda *_: pytest.fail("sent"))
    record_all(tmp_path / "run")
    assert said(tmp_path / "run") == [("finished", "")]


def test_a_stored_run_is_told_of_once_and_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str]] = []
    answers = iter([notify.Outcome("address 1 of 1 did not take it", 1), notify.Outcome("", 2)])
    monkeypatch.setattr(notify, "deliver", lambda *text: sent.append(text) or next(answers))
    critical = [a for a in record_all(tmp_path / "run") if a.severity == "critical"][0]
    for expected in ("did not take it", "", None):
        with open_run(tmp_path / "run") as run:
            outcome = notify.tell_of("run", run, [critical])
        assert outcome is None if expected is None else expected in outcome.problem
    assert len(sent) == 2, "again after it failed, not after it was taken"
    assert said(tmp_path / "run") == [
        ("finished", ""), ("notification_failed", f"{critical.id}: address 1 of 1 did not take it"),
        ("notified", f"{critical.id}: 2 addresses"),
    ]  # fmt: skip
    state = run_state(LocalStorage(tmp_path / "run"))
    assert (state.name, state.detail, state.phase) == ("finished", "", "finished")
