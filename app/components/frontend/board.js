// The live board: status tiles, one sentence of state, one Plotly figure.
//
// Plotly.react on one node keeps the reader's zoom and hover; st.plotly_chart would mount a new chart for every change.
// The steps that the reader zoomed to go back to the server, which answers with finer columns.
// All text goes through textContent: names and details come from disk and are never markup.

const SHAPES = { ok: "●", warning: "▲", critical: "■", idle: "○" };
const boards = new WeakMap();
let plotly;

function loadPlotly(url) {
  plotly ??= new Promise((resolve, reject) => {
    if (globalThis.Plotly) return resolve(globalThis.Plotly);
    const script = document.createElement("script");
    script.src = url;
    script.onload = () => resolve(globalThis.Plotly);
    script.onerror = () => reject(new Error(`cannot load ${url}`));
    document.head.append(script);
  });
  return plotly;
}

function element(className, parent) {
  const node = document.createElement("div");
  node.className = className;
  parent.append(node);
  return node;
}

function isDark(root) {
  const colour = getComputedStyle(root).getPropertyValue("--st-background-color").trim();
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  return 0.299 * r + 0.587 * g + 0.114 * b < 128;
}

// A copy of the figure with every "@name" looked up. Arrays are data and stay as they are.
export function coloured(value, palette) {
  if (typeof value === "string") {
    if (value === "@density") return palette.density.map((c, i, all) => [i / (all.length - 1), c]);
    return value.startsWith("@") && value.slice(1) in palette ? palette[value.slice(1)] : value;
  }
  if (Array.isArray(value)) {
    return value.some((v) => v && typeof v === "object") ? value.map((v) => coloured(v, palette)) : value;
  }
  if (!value || typeof value !== "object" || "bdata" in value) return value;
  const result = {};
  for (const [key, inner] of Object.entries(value)) {
    const markup = key === "text" && typeof inner === "string" && inner.includes("color:@");
    result[key] = markup
      ? inner.replace(/color:@([a-z]+)/g, (_, name) => `color:${palette[name]}`)
      : coloured(inner, palette);
  }
  return result;
}

function age(seconds) {
  if (seconds < 10) return `${Math.max(0, seconds).toFixed(1)} s`;
  if (seconds < 120) return `${seconds.toFixed(0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(0)} h` : `${(seconds / 86400).toFixed(0)} d`;
}

class Board {
  constructor(root) {
    this.root = root;
    this.tiles = element("mhpo-tiles", root);
    this.banner = element("mhpo-banner", root);
    this.banner.setAttribute("role", "status");
    this.plot = element("mhpo-plot", root);
    this.plot.setAttribute("role", "img");
    this.renders = 0;
    this.clock = setInterval(() => this.showAge(), 250);
  }

  show(text, url) {
    const dark = isDark(this.root);
    if (text === this.text && dark === this.dark) return;
    if (text !== this.text) this.content = JSON.parse(text);
    [this.text, this.dark] = [text, dark];
    const content = this.content;
    this.palette = content.palettes[dark ? "dark" : "light"];
    this.showTiles(content);
    this.showBanner(content);
    Object.assign(this.root.dataset, {
      state: content.state, level: content.level, run: content.run, version: content.version, step: content.step ?? "",
    });
    this.plot.hidden = !content.figure;
    if (content.figure) loadPlotly(url).then((P) => this.draw(P, content)).catch((e) => this.fail(e));
  }

  showTiles(content) {
    const state = { name: "state", label: "State", value: `${SHAPES[content.level]} ${content.state}`, level: content.level };
    const wanted = [state, ...content.tiles];
    while (this.tiles.children.length > wanted.length) this.tiles.lastChild.remove();
    wanted.forEach((tile, i) => {
      let node = this.tiles.children[i];
      if (!node) {
        node = element("mhpo-tile", this.tiles);
        element("label", node);
        element("value", node);
      }
      node.dataset.tile = tile.name;
      node.style.borderLeftColor = this.palette[tile.level] ?? "";
      node.children[0].textContent = tile.label;
      if (tile.name !== "age") node.children[1].textContent = tile.value;
      if (tile.note) {
        const note = document.createElement("span");
        note.className = "note";
        note.textContent = tile.note;
        node.children[1].append(note);
      }
    });
    this.showAge();
  }

  showBanner(content) {
    this.banner.hidden = !content.banner;
    this.banner.textContent = content.banner ? `${SHAPES[content.level]} ${content.banner}` : "";
    this.banner.style.borderLeftColor = this.palette[content.level] ?? "";
  }

  showAge() {
    const value = this.tiles.querySelector('[data-tile="age"] .value');
    if (value && this.content?.wall_time) value.textContent = age(Date.now() / 1000 - this.content.wall_time);
  }

  draw(P, content) {
    if (content !== this.content || !this.root.isConnected) return undefined;
    const figure = coloured(content.figure, this.palette);
    figure.layout.uirevision = `${content.run}|${content.window}`;
    figure.layout.height = Math.max(560, Math.min(1000, window.innerHeight - this.plot.getBoundingClientRect().top - window.scrollY - 24));
    figure.layout.font.family = getComputedStyle(this.root).fontFamily;
    figure.layout.autosize = true;
    const options = { displaylogo: false, responsive: true, scrollZoom: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
    return P.react(this.plot, figure.data, figure.layout, options).then(() => this.listen()).then(() =>
      requestAnimationFrame(() => {
        this.renders += 1;
        Object.assign(this.root.dataset, {
          drawnStep: content.step, drawnVersion: content.version, drawnAt: Date.now(), renders: this.renders,
        });
        const last = content.tiles.find((t) => t.name === "step")?.value;
        this.plot.setAttribute("aria-label", `Run ${content.run}, state ${content.state}, step ${last}`);
      }),
    );
  }

  // Tell the server which steps are shown, once per zoom; its answer keeps the zoom.
  listen() {
    if (this.listens) return;
    this.listens = true;
    this.plot.on("plotly_relayout", (change) => {
      const key = Object.keys(change).find((k) => /^xaxis\d*\.(range\[0\]|range|autorange)$/.test(k));
      if (!key) return;
      const range = key.endsWith("autorange") ? null : this.plot.layout.xaxis.range.map(Number);
      const steps = range && [Math.floor(range[0]), Math.ceil(range[1])];
      this.report?.(steps && steps.every(Number.isFinite) ? steps : null);
    });
  }

  fail(error) {
    this.banner.hidden = false;
    this.banner.textContent = `${SHAPES.critical} The figure cannot be drawn: ${error.message}`;
    console.error(error);
  }

  remove() {
    clearInterval(this.clock);
    if (globalThis.Plotly) globalThis.Plotly.purge(this.plot);
  }
}

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.querySelector(".mhpo-board");
  if (!boards.has(root)) boards.set(root, new Board(root));
  boards.get(root).report = (steps) => setStateValue("steps", steps);
  boards.get(root).show(data.payload, data.plotly);
  return () => setTimeout(() => {
    // Streamlit also cleans up before it runs this function again on the same node
    if (root.isConnected || !boards.has(root)) return;
    boards.get(root).remove();
    boards.delete(root);
  });
}
