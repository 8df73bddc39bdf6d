"""Entry script of the dashboard: navigation between the pages."""

from pathlib import Path

import streamlit as st

PAGES = Path(__file__).parent / "app_pages"

st.set_page_config(page_title="mhpo", page_icon=str(Path(__file__).parent / "favicon.png"), layout="wide")
# the width that Streamlit keeps free for prose; its theme can set only the padding above and below
st.html("<style>[data-testid=stMainBlockContainer] { padding-left: 1.25rem; padding-right: 1.25rem; }</style>")
st.navigation(
    [
        st.Page(PAGES / "live.py", title="Live", icon=":material/monitoring:", default=True),
        st.Page(PAGES / "alarms.py", title="Alarms", icon=":material/notifications:"),
        st.Page(PAGES / "runs.py", title="Runs", icon=":material/list:"),
    ],
    position="top",
).run()
