"""Alarms: what was found in one run, the signs behind it in their order, and what to do about it."""

from typing import Any

import pandas as pd
import streamlit as st

from app.about import about_alarms
from app.session import incidents_of, run_names
from app.settings import runs_folder
from app.text import visible
from mhpo_core.alarms import CRITICAL, MODES

REFRESH_SECONDS = 3.0
_EMPTY = "–"
_LIMITS = (
    "Critical alarms of labelled runs, beside the thresholds in use and other tools on the same data. A collapse is "
    "found by a critical alarm between 25 rows before its onset and 2 after; the same window on healthy runs gives "
    "what chance would find.",
    "The labelled collapses are few and from few places, and the thresholds were chosen on them: expect less on your "
    "own runs. The command mhpo backtest scores those.",
)


def number(value: Any) -> str:
    """A number of any size in few characters."""
    return _EMPTY if value is None else f"{value:.4g}" if isinstance(value, int | float) else visible(str(value))


def escaped(text: str) -> str:
    """Text for a title, which Streamlit reads as Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-.!|~$:" else c for c in text)


def signs_table(alarm: dict[str, Any]) -> None:
    """The signals behind an alarm, the first one first."""
    signs = alarm["evidence"]["signs"]
    if not signs:
        return
    st.caption("Signs in the order in which they appeared")
    rows = {
        "from step": [s["onset_step"] for s in signs],
        "signal": [s["label"] for s in signs],
        "now": [number(s["value"]) for s in signs],
        "median before": [number(s["baseline"]) for s in signs],
    }
    st.dataframe(pd.DataFrame(rows), hide_index=True, key=f"signs-{alarm['id']}")


def tokens_table(alarm: dict[str, Any]) -> None:
    """The tokens whose ratios are largest at the step of the alarm."""
    tokens = alarm["evidence"].get("tokens")
    if not tokens:
        return
    st.caption(f"Tokens of step {alarm['step']:,} that moved furthest, of those that are kept")
    rows = {
        "sequence": [str(t["sequence_id"]) for t in tokens],
        "position": [t["position"] for t in tokens],
        "token": [visible(t["token"]) if t["token"] is not None else str(t["token_id"]) for t in tokens],
        "log-ratio": [number(t["log_ratio"]) for t in tokens],
        "mismatch": [number(t["mismatch"]) for t in tokens],
        "advantage": [number(t["advantage"]) for t in tokens],
    }
    st.dataframe(pd.DataFrame(rows), hide_index=True, key=f"tokens-{alarm['id']}")


def layers_table(alarm: dict[str, Any]) -> None:
    """The parameter groups whose gradient rose."""
    layers = alarm["evidence"].get("layers")
    if not layers:
        return
    st.caption("Layers whose gradient stands out from its own past")
    rows = {
        "layer": [visible(x["layer"]) for x in layers],
        "gradient norm": [number(x["grad_norm"]) for x in layers],
        "median before": [number(x["usual"]) for x in layers],
        "factor": [number(x["factor"]) for x in layers],
    }
    st.dataframe(pd.DataFrame(rows), hide_index=True, key=f"layers-{alarm['id']}")


def show(alarm: dict[str, Any], opened: bool) -> None:
    """One alarm, with everything behind it."""
    mode = MODES[alarm["mode"]]
    critical = alarm["severity"] == CRITICAL
    icon = ":material/error:" if critical else ":material/warning:"
    finding = visible(alarm["message"].split(": ", 1)[-1].split(". In order", 1)[0], 120)
    title = f"Step {alarm['step']:,} · {mode.title if critical else escaped(finding)}"
    with st.expander(title, expanded=opened, icon=icon):
        st.text(visible(alarm["message"], 600))
        good = alarm["evidence"]["last_good_step"]
        left, right = st.columns([3, 2], gap="large")
        with left:
            signs_table(alarm)
            tokens_table(alarm)
            layers_table(alarm)
        with right:
            st.caption("Suspected cause")
            st.text(f"{mode.cause[0].upper()}{mode.cause[1:]}.")
            st.caption("Last step before the first sign")
            st.text("none" if good is None else f"{good:,}")
            st.caption("What to do")
            for text in alarm["advice"]:
                st.text(f"• {text}")


@st.fragment(run_every=REFRESH_SECONDS)
def incidents(run: str) -> None:
    """The alarms of what is committed now."""
    with st.spinner("Judging the steps…"):
        found = incidents_of(run)
    if found.problem:
        st.text(visible(found.problem, 300))
        return
    critical = [a for a in found.alarms if a["severity"] == CRITICAL]
    others = [a for a in found.alarms if a["severity"] != CRITICAL]
    st.text(f"{found.steps:,} steps judged: {len(critical)} critical, {len(others)} warnings.")
    for index, alarm in enumerate(critical):
        show(alarm, opened=index == 0)
    if others:
        st.caption("Warnings: one signal alone, and in many healthy runs harmless")
        for alarm in others:
            show(alarm, opened=False)
    if found.missing:
        with st.expander(f"{len(found.missing)} signals had no data", icon=":material/help:"):
            rows = {"signal": list(found.missing), "to have it": list(found.missing.values())}
            st.dataframe(pd.DataFrame(rows), hide_index=True, key="missing")


def about() -> None:
    """How good the alarms are, measured, beside what is in use elsewhere."""
    with st.expander("About the alarms: how often they are right", icon=":material/info:"):
        for line in _LIMITS:
            st.text(line)
        for index, found in enumerate(about_alarms()):
            st.caption(found.title)
            st.dataframe(pd.DataFrame(list(found.rows)), hide_index=True, key=f"about-{index}")


names = run_names()
if not names:
    st.subheader("No run yet")
    st.text(f"Looking in {runs_folder()}. Alarms of a run appear here as soon as it has steps.")
else:
    chosen = st.selectbox(
        "Run", names, key="run", bind="query-params", format_func=visible, label_visibility="collapsed"
    )
    incidents(chosen or names[0])
about()
