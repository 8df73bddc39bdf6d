"""Numbers and untrusted text made readable."""

from __future__ import annotations

import unicodedata

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str, limit: int = 200) -> str:
    """Text with control, bidirectional and zero-width characters replaced by ⟨code point⟩, cut at `limit`.

    A terminal then executes no escape sequence from a file name, and a page shows no text in a false order.
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(f"⟨{ord(c):x}⟩" if unicodedata.category(c) in _HIDDEN else c for c in cut)


def human_bytes(size: float) -> str:
    """1536 → `1.5 kB`; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_duration(seconds: float) -> str:
    """75 → `1 min`; never negative, since clocks step back."""
    seconds = max(0.0, seconds)
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"
