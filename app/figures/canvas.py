"""Drawing primitives of the live board: panels that share a time axis per column, lines, bands, marks, baselines.

Shape letters: K columns of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.figures.encode import typed
from collectors.window import Window

Floats = NDArray[np.float64]
Spec = dict[str, Any]

# Up to this many points a line also gets markers: it can be too short to see, and through one point it is nothing.
_FEW = 30


@dataclass
class Canvas:
    """A figure under construction: every panel has a y axis of its own, the panels of one column share their x axis.

    An axis costs the browser as much time per refresh as a line, so there are as few as possible.

    Args:
        x: (K,) middles of the columns, in steps.
        width: steps of one column.
    """

    x: Floats
    width: float
    traces: list[Spec] = field(default_factory=list)
    layout: Spec = field(default_factory=dict)
    panels: int = 0
    _columns: list[tuple[float, float]] = field(default_factory=list)

    def panel(
        self, columns: tuple[float, float], rows: tuple[float, float], title: str, note: str, **axis: Any
    ) -> None:
        """Open the next panel; `columns` and `rows` are shares of the figure. The last of a column is its lowest."""
        self.panels += 1
        if columns not in self._columns:
            self._columns.append(columns)
        self.layout["xaxis" + self._x] = {
            "domain": columns, "anchor": f"y{self._y}", "showgrid": False, "zeroline": False, "linecolor": "@border",
            "tickfont": {"size": 11, "color": "@muted"}, "autorangeoptions": {"include": self._span()},
            "showspikes": True, "spikemode": "across",
            "spikethickness": 1, "spikecolor": "@muted", "spikedash": "dot", **({"matches": "x"} if self._x else {}),
        }  # fmt: skip
        self.layout["yaxis" + self._y] = {
            "domain": rows, "anchor": f"x{self._x}", "gridcolor": "@grid", "zeroline": False, "nticks": 5,
            "tickfont": {"size": 11, "color": "@muted"}, "automargin": False, **axis,
        }  # fmt: skip
        self.annotate(f"<b>{title}</b>  <span style='color:@muted'>{note}</span>", columns[0], rows[1] + 0.008)

    def _span(self) -> list[float]:
        # Whole columns; plotly's own choice ends in the middle of the last one. A `range` would undo the reader's zoom.
        return [float(self.x[0] - self.width / 2), float(self.x[-1] + self.width / 2)]

    @property
    def _x(self) -> str:
        return "" if len(self._columns) == 1 else str(len(self._columns))

    @property
    def _y(self) -> str:
        return "" if self.panels == 1 else str(self.panels)

    @property
    def axes(self) -> Spec:
        """Axes of the current panel, as a trace names them."""
        return {"xaxis": f"x{self._x}", "yaxis": f"y{self._y}"}

    @property
    def y_axis(self) -> Spec:
        """Settings of the current panel's y axis."""
        return self.layout["yaxis" + self._y]

    def annotate(self, text: str, x: float, y: float, **more: Any) -> None:
        """Text at a place in the figure; `text` may hold markup, so nothing untrusted goes in."""
        place = {"xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom", "showarrow": False}
        self.layout.setdefault("annotations", []).append(
            {"text": text, "x": x, "y": y, "font": {"size": 12, "color": "@text"}, **place, **more}
        )

    def line(self, y: Floats, name: str, colour: str, **more: Any) -> None:
        """One line in the current panel."""
        style = {"color": colour, "width": 1.5} | more.pop("line", {})
        mode = "lines+markers" if len(self.x) <= _FEW and style["width"] else "lines"
        more = {"marker": {"size": 4, "color": colour}, **more}
        self.traces.append(
            {"type": "scatter", "mode": mode, "x": typed(self.x), "y": typed(y), "name": name, "line": style}
            | {"hovertemplate": "%{y:.4g}", **self.axes, **more}
        )

    def metric(self, window: Window, name: str, text: str, colour: str, *, band: str | None = None) -> None:
        """A metric as line, with the range inside each column as a band and non-finite values as marks."""
        column = window.metrics.names.index(name)
        size = window.size
        mean = window.metrics.mean(size)[:, column]
        if band and window.width > 1:
            self.band(window.metrics.low[:size, column], window.metrics.high[:size, column], f"{text} range", band)
        self.line(mean, text, colour)
        self.marks(window.metrics.nonfinite[:size, column] > 0, mean, text)

    def band(self, low: Floats, high: Floats, name: str, colour: str) -> None:
        """The area between two lines as one polygon; columns without a finite value are bridged."""
        known = np.isfinite(low) & np.isfinite(high)
        x = self.x[known]
        self.traces.append(
            {
                "type": "scatter", "mode": "lines", "x": typed(np.concatenate([x, x[::-1]])), "fill": "toself",
                "y": typed(np.concatenate([high[known], low[known][::-1]])), "name": name, "fillcolor": colour,
                "line": {"width": 0, "color": colour}, "hoverinfo": "skip", **self.axes,
            }
        )  # fmt: skip

    def log_ticks(self, window: Window, *names: str) -> None:
        """Ticks of a logarithmic axis that stay readable from a tenth of a decade to twenty decades."""
        columns = [window.metrics.names.index(name) for name in names]
        mean = window.metrics.mean(window.size)[:, columns]
        positive = mean[mean > 0]
        decades = float(np.ptp(np.log10(positive))) if positive.size else 0.0
        self.y_axis["dtick"] = "D1" if decades < 0.5 else "D2" if decades < 1.5 else int(np.ceil(decades / 4))

    def marks(self, bad: NDArray[np.bool_], mean: Floats, text: str) -> None:
        """Crosses where a value was NaN or ±Inf, at the top of what is drawn, so that they are never a mere gap."""
        if not bad.any():
            return
        # a logarithmic axis has no place for zero
        known = mean[np.isfinite(mean) & ((mean > 0) | (self.y_axis.get("type") != "log"))]
        top = float(known.max()) if known.size else 1.0
        self.traces.append(
            {
                "type": "scatter", "mode": "markers", "x": typed(self.x[bad]), "y": typed(np.full(bad.sum(), top)),
                "name": f"{text}: NaN or ±Inf", "marker": {"symbol": "x", "size": 8, "color": "@critical"},
                "hovertemplate": "NaN or ±Inf", **self.axes,
            }
        )  # fmt: skip

    def say_if_empty(self, window: Window, names: tuple[str, ...], why: str) -> None:
        """A sentence instead of an empty panel."""
        if self.has(window, names):
            return
        axes = self.axes
        place = {"xref": f"{axes['xaxis']} domain", "yref": f"{axes['yaxis']} domain", "xanchor": "center"}
        self.annotate(why, 0.5, 0.4, font={"size": 11, "color": "@muted"}, **place)
        self.y_axis.update(showticklabels=False, showgrid=False, ticks="")

    def has(self, window: Window, names: tuple[str, ...]) -> bool:
        """True if a step of the window has a value of one of these metrics, be it NaN."""
        columns = [window.metrics.names.index(name) for name in names]
        seen = np.isfinite(window.metrics.mean(window.size)[:, columns]).any()
        return bool(seen or window.metrics.nonfinite[: window.size, columns].any())

    def baseline(self, value: float, text: str, *, below: bool = False) -> None:
        """A dashed level across the current panel, its text on the side where the data is not."""
        axes = self.axes
        self.layout.setdefault("shapes", []).append(
            {
                "type": "line", "xref": f"{axes['xaxis']} domain", "yref": axes["yaxis"], "x0": 0, "x1": 1, "y0": value,
                "y1": value, "line": {"color": "@muted", "width": 1, "dash": "dash"},
            }
        )  # fmt: skip
        self.annotate(
            text, 0.998, value, xref=f"{axes['xaxis']} domain", yref=axes["yaxis"], xanchor="right",
            yanchor="top" if below else "bottom", font={"size": 10, "color": "@muted"},
        )  # fmt: skip
