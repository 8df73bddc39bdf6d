"""Streamlit components whose front end ships with the package, in `frontend/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly
import streamlit as st
from streamlit.components.v2.get_bidi_component_manager import get_bidi_component_manager
from streamlit.components.v2.manifest_scanner import ComponentConfig, ComponentManifest

PLOTLY_SCRIPT = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
PLOTLY_URL = f"/vendor/plotly-{plotly.__version__}.min.js"

_MANIFEST = ComponentManifest("mhpo", "1", [ComponentConfig("board", asset_dir="frontend")])


def _declare() -> Any:
    # Streamlit finds component files through a manifest in an installed wheel only; registering it here as well works
    # in an editable install too. Files instead of inline scripts keep the content security policy strict.
    get_bidi_component_manager().register_from_manifest(_MANIFEST, Path(__file__).parent)
    return st.components.v2.component(
        "mhpo.board", html='<div class="mhpo-board"></div>', js="board.js", css="board.css", isolate_styles=False
    )


def live_board(payload: str, *, key: str) -> None:
    """Draw a payload of `app.live.LiveRun`; zoom, hover and the plot node survive every new payload of a run."""
    data = {"payload": payload, "plotly": PLOTLY_URL}
    _declare()(data=data, key=key, height="content", on_steps_change=lambda: None)


def zoomed_steps(key: str) -> tuple[int, int] | None:
    """First and last step that the reader of a board has zoomed to, None for all; what a browser sends is untrusted."""
    state = st.session_state.get(key)
    steps = state.get("steps") if hasattr(state, "get") else None
    if not isinstance(steps, list) or len(steps) != 2 or not all(isinstance(s, int | float) for s in steps):
        return None
    first, last = (int(min(max(s, 0), 2**53)) for s in steps)
    return (first, last) if first <= last else None
