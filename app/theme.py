"""Colours, once for Streamlit's own elements and for every figure.

Checked for colour blindness: smallest OKLab distance ×100 over normal, protan, deutan and tritan vision is 20 (dark)
and 19 (light) for the state colours, 24 for the pair of signs. Blue and orange mean sign, yellow and red mean level.
"""

from __future__ import annotations

from typing import Any

DARK: dict[str, Any] = {
    "background": "#0F1318",
    "card": "#171D24",
    "border": "#2A323C",
    "grid": "#232B34",
    "text": "#E6EAEE",
    "muted": "#9AA5B1",
    "ok": "#4FB3D9",
    "warning": "#F4C95D",
    "critical": "#E5533D",
    "contraction": "#3E9BDC",
    "expansion": "#E08E24",
    "line": "#56B4E9",
    "second": "#E69F00",
    "third": "#99F7FC",
    "band": "rgba(86,180,233,0.22)",
    "quantile": "rgba(255,255,255,0.85)",
    "tail": "rgba(255,255,255,0.45)",
    "density": ["#0F1318", "#1B365D", "#276C8F", "#4FA69F", "#B4DCAC", "#F2F3C8"],
}
LIGHT: dict[str, Any] = {
    "background": "#FBFCFD",
    "card": "#F1F4F7",
    "border": "#D5DCE3",
    "grid": "#E3E8ED",
    "text": "#1A222B",
    "muted": "#586472",
    "ok": "#1374B8",
    "warning": "#C08A00",
    "critical": "#8E1B3B",
    "contraction": "#0072B2",
    "expansion": "#D98200",
    "line": "#0072B2",
    "second": "#9F5B00",
    "third": "#15197C",
    "band": "rgba(0,114,178,0.18)",
    "quantile": "rgba(16,24,32,0.85)",
    "tail": "rgba(16,24,32,0.45)",
    "density": ["#FBFCFD", "#98D0C0", "#3D9AA8", "#1C5C83", "#1A4067", "#122644"],
}
PALETTES = {"light": LIGHT, "dark": DARK}


def streamlit_options() -> dict[str, Any]:
    """The same colours as Streamlit configuration."""
    names = {
        "primaryColor": "ok",
        "backgroundColor": "background",
        "secondaryBackgroundColor": "card",
        "textColor": "text",
        "borderColor": "border",
    }
    colours = {
        f"theme.{mode}.{option}": palette[name] for mode, palette in PALETTES.items() for option, name in names.items()
    }
    return colours | {
        "theme.baseRadius": "4px",
        "theme.baseFontSize": 14,
        "theme.showWidgetBorder": True,
        "theme.paddingTop": "0.75rem",
        "theme.paddingBottom": "1rem",
    }
