"""Runs: every run of the folder with its state and newest numbers."""

import pandas as pd
import streamlit as st

from app.settings import runs_folder
from app.text import human_bytes, visible
from collectors.listing import list_runs
from mhpo_core.errors import StoreError


@st.fragment(run_every=3.0)
def table() -> None:
    """The table, refreshed in place."""
    try:
        summaries = list_runs(runs_folder())
    except StoreError as error:
        st.text(str(error))
        return
    if not summaries:
        st.text(f"No run in {runs_folder()} yet. `mhpo train --preset healthy` or `make demo` makes one.")
        return
    rows = pd.DataFrame(
        {
            "run": [visible(s.run_id) for s in summaries],
            "state": [s.state.name for s in summaries],
            "health": [visible(s.problem) or s.health for s in summaries],
            "objective": [visible(s.objective) for s in summaries],
            "step": pd.array([s.last_step for s in summaries], dtype="Int64"),
            "reward": pd.array([s.reward for s in summaries], dtype="Float64"),
            "newest data": pd.to_datetime([s.last_time for s in summaries], unit="s", utc=True),
            "size": [human_bytes(s.size) for s in summaries],
        }
    )
    st.dataframe(
        rows,
        hide_index=True,
        key="runs",
        column_config={
            "reward": st.column_config.NumberColumn(format="%.3f", help="mean reward of the newest step"),
            "health": st.column_config.TextColumn(
                help="non-finite: the newest step has NaN or ±Inf tokens or loss; critical at: newest critical alarm"
            ),
            "newest data": st.column_config.DatetimeColumn(format="distance"),
        },
    )


st.subheader("Runs")
table()
