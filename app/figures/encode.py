"""Arrays and text on their way into a Plotly figure."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from app.text import visible


def typed(values: ArrayLike, dtype: str = "f4") -> dict[str, Any]:
    """A typed array as plotly.js decodes it natively: a tenth of the time of a JSON list, NaN and ±Inf survive."""
    array = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    encoded: dict[str, Any] = {"dtype": dtype, "bdata": base64.b64encode(array.tobytes()).decode("ascii")}
    if array.ndim == 2:
        encoded["shape"] = f"{array.shape[0]}, {array.shape[1]}"
    return encoded


def label(text: str, limit: int = 60) -> str:
    """Untrusted text for a tick or a hover: Plotly renders a subset of HTML, so it is escaped."""
    return visible(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
