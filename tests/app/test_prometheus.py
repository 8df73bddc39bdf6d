"""/metrics: what Prometheus' own parser reads from it, for runs as they come; the server has it only if asked."""

from __future__ import annotations

import http.client
import math
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from app import prometheus
from app.cli import main
from collectors import Recorder, open_run
from tests.app.runs import record_run, token_batch
from tests.collectors.test_alarms import record_all

installed = pytest.mark.skipif(
    find_spec("prometheus_client") is None,
    reason="prometheus_client is not installed; `make test` installs it (pip install -e '.[test]')",
)
ODD = ['a"b\\c', "new\nline", "esc\x1b[31m{}=,", os.fsdecode(b"not \xff utf-8")]


def scraped(text: bytes) -> dict[tuple[str, ...], float]:
    """(name, run, severity if any) → value."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text.decode())
        for s in family.samples
    }


@installed
def test_the_newest_step_of_every_run(tmp_path: Path) -> None:
    record_run(tmp_path / "one", 3)
    with Recorder(tmp_path / "nan", objective="grpo") as recorder:
        recorder.record(7, token_batch(0), grad_norm=math.nan, wall_time=1e9)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    answer = prometheus.scraper(tmp_path)
    text, kind = answer("")
    assert kind.startswith("text/plain")
    found = scraped(text)
    with open_run(tmp_path / "one") as run:
        (stored,) = run.sql(
            f"SELECT step, wall_time, {', '.join(prometheus.SHOWN)} FROM steps ORDER BY step DESC LIMIT 1"
        ).fetchall()
    names = ("step", "wall_time_seconds", *prometheus.SHOWN)
    expected = {(f"mhpo_{n}", "one"): v for n, v in zip(names, stored, strict=True) if v is not None}
    assert len(expected) > 5
    assert {k: v for k, v in found.items() if k[1] == "one" and len(k) == 2} == pytest.approx(
        expected | {("mhpo_readable", "one"): 1.0}
    )
    assert math.isnan(found["mhpo_grad_norm", "nan"]) and found["mhpo_step", "nan"] == 7
    assert found["mhpo_wall_time_seconds", "nan"] == 1e9 and ("mhpo_reward_mean", "nan") not in found
    assert [k for k in found if k[1] == "bad"] == [("mhpo_readable", "bad")] and found["mhpo_readable", "bad"] == 0
    assert answer("application/openmetrics-text; version=1.0.0")[0].endswith(b"# EOF\n")


@installed
def test_a_run_that_goes_on_is_followed(tmp_path: Path) -> None:
    answer = prometheus.scraper(tmp_path / "runs")
    assert scraped(answer("")[0]) == {}, "a folder that is not there yet"
    for step in (0, 1):
        with Recorder(tmp_path / "runs" / "r", objective="grpo") as recorder:
            recorder.record(step, token_batch(step), grad_norm=1.0 + step)
        assert scraped(answer("")[0])["mhpo_grad_norm", "r"] == 1.0 + step


@installed
def test_alarms_are_counted_by_severity_and_without_those_of_steps_trained_again(tmp_path: Path) -> None:
    raised = record_all(tmp_path / "r")
    answer = prometheus.scraper(tmp_path)

    def counts() -> list[float]:
        found = scraped(answer("")[0])
        return [found["mhpo_alarms", "r", severity] for severity in ("critical", "warning")]

    assert counts() == [sum(a.severity == s for a in raised) for s in ("critical", "warning")] != [0, 0]
    with Recorder(tmp_path / "r", objective="mhpo", alarms=None) as recorder:
        recorder.record(min(a.step for a in raised), token_batch(0))
    assert counts() == [0, 0]


@installed
def test_odd_names_of_runs_come_out_as_they_are(tmp_path: Path) -> None:
    for name in ODD:
        record_run(tmp_path / "plain", 1)
        try:
            (tmp_path / "plain").rename(tmp_path / name)
        except OSError:
            pytest.skip("this file system takes no such names")
    found = scraped(prometheus.scraper(tmp_path)("")[0])
    names = {labels[0] for name, *labels in found if name == "mhpo_step"}
    assert names == {*ODD[:3], "not \\udcff utf-8"}


@installed
def test_the_server_has_it_if_asked(tmp_path: Path) -> None:
    record_run(tmp_path / "one", 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "app.cli", "dash", str(tmp_path), "--port", str(port), "--metrics"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None and "Dashboard" in server.stderr.readline()
        try:
            answers = {}
            for host in (f"127.0.0.1:{port}", "attacker.example"):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                connection.request("GET", "/metrics", headers={"Host": host})
                response = connection.getresponse()
                answers[host] = (response.status, response.read())
        finally:
            server.terminate()
    assert answers["attacker.example"][0] == 403
    status, text = answers[f"127.0.0.1:{port}"]
    assert status == 200 and scraped(text)["mhpo_step", "one"] == 1


def test_without_the_package_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prometheus, "find_spec", lambda name: None)
    assert main(["dash", str(tmp_path), "--port", "18599", "--metrics"]) == 2
    assert "pip install 'mhpo[prometheus]'" in capsys.readouterr().err
