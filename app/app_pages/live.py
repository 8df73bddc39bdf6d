"""Live: the board of one run, moving while it trains."""

import streamlit as st

from app.components import live_board, zoomed_steps
from app.session import follow, run_names
from app.settings import runs_folder
from app.text import visible
from collectors.tail import ALL_STEPS, RECENT

REFRESH_SECONDS = 0.25
WINDOWS = {"All steps": ALL_STEPS} | {f"Last {steps:,}": name for name, steps in RECENT.items()}


@st.fragment(run_every=1.0)
def watch_folder(known: list[str]) -> None:
    """Run the page again when a run appears or goes away."""
    if run_names() != known:
        st.rerun(scope="app")


@st.fragment(run_every=REFRESH_SECONDS)
def refresh(run: str, window: str) -> None:
    """Draw what is committed now; the browser gets nothing when nothing changed."""
    live_board(follow(run).payload(window, zoomed_steps("board")), key="board")


@st.fragment
def keep_button(run: str) -> None:
    """Offer to keep the ring: every token of the last steps, which would otherwise go."""
    kept = st.button("Keep last steps", help="Keeps all tokens of the steps in the ring for good, as `mhpo pin` does.")
    if kept:
        st.toast(follow(run).pin())


names = run_names()
watch_folder(names)
if not names:
    st.subheader("No run yet")
    st.text(f"Looking in {runs_folder()}. The page opens the first run that appears there.")
    st.code(
        "mhpo train --preset healthy            # train a small model here\n"
        "make demo                              # the same, with this dashboard\n\n"
        "with Recorder('runs/my-run', objective='grpo') as recorder:   # or record your own loop\n"
        "    recorder.record(step=0, batch=batch, reward=reward)",
        language="bash",
    )
    st.stop()

left, right, action = st.columns([5, 4, 2], vertical_alignment="center")
with left:
    chosen = st.selectbox(
        "Run", names, key="run", bind="query-params", format_func=visible, label_visibility="collapsed"
    )
with right:
    shown = st.segmented_control(
        "Steps", list(WINDOWS), default="All steps", key="steps", bind="query-params", label_visibility="collapsed",
        required=True,
    )  # fmt: skip
with action:
    keep_button(chosen or names[0])
refresh(chosen or names[0], WINDOWS[shown or "All steps"])
