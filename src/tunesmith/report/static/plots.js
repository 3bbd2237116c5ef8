// Curves over steps that zoom and can be read, for the report and the live page; drawn by uPlot.
//
//   const chart = Plots.draw(place, {title, unit, zero, series: [{label, run, x, y, faint, dots}]});
//   chart.update(series)        // new points; a zoom stays
//
// `run` picks colour and dashes; `faint` is for the raw values under a smoothed curve; `thin` lines have no dashes; `dots`
// marks each point.
// All charts of a page share the read-out's step and the zoom. Drag (mouse or finger) or + zooms in, - out, Esc or a
// double click shows all; the arrow keys move the read-out, with Shift by ten points.
"use strict";
const Plots = (() => {
  const charts = new Set();
  // A page may show another x axis than steps, and may bring finer points for the window that is zoomed to (null: all).
  const page = { x: "step", zoomed: (window) => window };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (run) => css(`--series-${run % 8}`);
  const DASHES = [[], [8, 3], [2, 3], [10, 3, 2, 3]];
  const dash = (run) => DASHES[run % DASHES.length];
  const HEIGHT = 240, SYNC = "step", FAINT = "59";  // a third opaque, as two hexadecimal digits

  // A number in 4 significant digits, as a person reads it: 2.314, 0.0001, 12,480, 1.2e-7.
  function format(value) {
    if (value == null || !isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    if (size !== 0 && size < 1e-4) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  }

  // A place on the x axis: a step, tokens such as 1.2M, seconds as 3:07 min.
  function formatX(value) {
    if (value == null) return "–";
    if (page.x === "tokens") return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 });
    if (page.x === "step") return value.toLocaleString("en");
    const minutes = Math.floor(value / 60), two = (part) => String(Math.floor(part)).padStart(2, "0");
    return minutes < 60 ? `${minutes}:${two(value % 60)} min` : `${Math.floor(minutes / 60)}:${two(minutes % 60)} h`;
  }
  const nameX = () => (page.x === "seconds" ? "time" : page.x);

  // Series of runs have steps of their own: they are joined on one axis, and the nearest point of each is read.
  function align(series) {
    const data = series.length ? uPlot.join(series.map((s) => [s.x, s.y])) : [[], []];
    return data.map((column) => Array.from(column));
  }

  function nearest(u, index, hovered) {
    const values = u.data[index];
    if (index === 0 || values[hovered] != null) return hovered;
    for (let far = 1; far < values.length; far++) {
      if (values[hovered - far] != null) return hovered - far;
      if (values[hovered + far] != null) return hovered + far;
    }
    return hovered;
  }

  function button(text, label, act) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-label", label);
    made.addEventListener("click", act);
    return made;
  }

  // uPlot knows the mouse alone; a finger that moves sideways is handed on as one.
  function followTouch(over) {
    const names = { pointerdown: "mousedown", pointermove: "mousemove", pointerup: "mouseup", pointercancel: "mouseup" };
    for (const [from, to] of Object.entries(names)) {
      over.addEventListener(from, (event) => {
        if (event.pointerType !== "touch") return;
        if (from === "pointerdown") over.setPointerCapture(event.pointerId);
        const { clientX, clientY } = event;
        over.dispatchEvent(new MouseEvent(to, { clientX, clientY, button: 0, bubbles: true }));
      });
    }
  }

  function draw(place, { title, unit = "", zero = false, series, height = HEIGHT }) {
    let current = series, log = false, u = null, at = null, zoomed = null, whole = null;
    const figure = document.createElement("figure");
    figure.className = "chart";
    const caption = document.createElement("figcaption"), name = document.createElement("b");
    name.textContent = unit ? `${title} (${unit})` : title;
    const scale = button("log", `${title}: logarithmic scale`, () => {
      log = !log;
      scale.setAttribute("aria-pressed", String(log));
      build();
    });
    scale.setAttribute("aria-pressed", "false");
    caption.append(name, scale, button("+", `${title}: zoom in`, () => zoom(0.5)),
      button("−", `${title}: zoom out`, () => zoom(2)), button("all", `${title}: show all steps`, () => show(null)));
    const plot = document.createElement("div"), said = document.createElement("output");
    plot.className = "plot";
    plot.tabIndex = 0;
    plot.setAttribute("role", "application");
    plot.setAttribute("aria-label", `${name.textContent} over steps. Arrow keys read values, plus and minus zoom, Escape shows all.`);
    said.className = "unseen";
    figure.append(caption, plot, said);
    place.append(figure);

    function options() {
      const one = (s) => ({
        label: s.label,
        stroke: () => colour(s.run) + (s.faint ? FAINT : ""),
        width: s.faint ? 1 : s.thin ? 1.5 : 2,
        dash: s.faint || s.thin ? [] : dash(s.run),
        spanGaps: true,
        points: { show: Boolean(s.dots) || s.x.length < 3, size: 7, fill: () => css("--page") },
        value: (u, value, i) => format(value ?? u.data[i].findLast((v) => v != null)),  // the last one where nothing is pointed at
      });
      const axis = { stroke: () => css("--soft"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { stroke: () => css("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
      const y = { ...axis, size: 70, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : format(tick))) };
      const padded = (low, high) => uPlot.rangeNum(low, high, 0.08, true).map((end) => (low >= 0 ? Math.max(0, end) : end));
      const range = (_, low, high) => (low == null ? [0, 1] : zero ? [0, high * 1.08 || 1] : padded(low, high));
      return {
        width: Math.max(200, plot.clientWidth), height,
        scales: { x: { time: false }, y: log ? { distr: 3 } : { range } },
        axes: [{ ...axis, size: 32, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? formatX(tick) : "")) }, y],
        series: [{ label: nameX(), value: (u, value) => formatX(value ?? u.data[0].at(-1)) }, ...current.map(one)],
        legend: { markers: { dash: (_, i) => (i && !current[i - 1].faint && !current[i - 1].thin && dash(current[i - 1].run).length ? "dashed" : "solid"), width: 3 } },
        cursor: {
          dataIdx: nearest, drag: { x: true, y: false }, points: { size: 8 },
          sync: { key: SYNC, setSeries: false, scales: ["x", null], filters: { pub: (kind) => kind === "mousemove" || kind === "mouseleave" } },
        },
        hooks: { setScale: [(_, key) => key === "x" && follow()] },
      };
    }

    function build() {
      u?.destroy();
      u = new uPlot(options(), align(current), plot);
      followTouch(u.over);
      if (zoomed) u.setScale("x", { min: zoomed[0], max: zoomed[1] });
    }

    function ends() {
      const steps = u.data[0];
      if (whole) return whole;  // the points of a window do not reach further
      return [steps[0] ?? 0, steps[steps.length - 1] ?? 1];
    }

    // A zoom by dragging reaches the other charts too.
    function follow() {
      if (!u) return;
      const { min, max } = u.scales.x, [first, last] = ends();
      const now = min == null || (min <= first && max >= last) ? null : [min, max];
      if (String(now) === String(zoomed)) return;
      zoomed = now;
      for (const other of charts) if (other !== chart) other.show(now, true);
      page.zoomed(now);
    }

    function show(window, quietly = false) {
      const [min, max] = window ?? ends();
      if (quietly) zoomed = window;
      u.setScale("x", { min, max });
    }

    function zoom(factor) {
      const [first, last] = ends(), { min, max } = u.scales.x;
      const middle = at != null && u.data[0][at] >= min && u.data[0][at] <= max ? u.data[0][at] : (min + max) / 2;
      const half = ((max - min) / 2) * factor;
      if (2 * half < 1) return;
      const window = [Math.max(first, middle - half), Math.min(last, middle + half)];
      show(window[0] <= first && window[1] >= last ? null : window);
    }

    function read(move) {
      const steps = u.data[0], { min, max } = u.scales.x;
      const inside = (i) => Math.min(Math.max(i, steps.findIndex((s) => s >= min)), steps.findLastIndex((s) => s <= max));
      const far = Math.abs(move) >= steps.length;
      at = inside(at == null && !far ? (move > 0 ? 0 : steps.length - 1) : (at ?? 0) + move);
      u.setCursor({ left: u.valToPos(steps[at], "x"), top: u.over.clientHeight / 2 });
      const values = current.filter((s) => !s.faint).map((s) => {
        const i = current.indexOf(s) + 1;
        return `${s.label} ${format(u.data[i][nearest(u, i, at)])}`;
      });
      said.textContent = `${nameX()} ${formatX(steps[at])}: ${values.join(", ")}`;
    }

    plot.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 10 : 1;
      const acts = {
        ArrowRight: () => read(far), ArrowLeft: () => read(-far), Home: () => read(-1e9), End: () => read(1e9),
        "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), 0: () => show(null), Escape: () => show(null),
      };
      if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      acts[event.key]();
    });

    // More series than before need a new plot; more points of the same ones do not.
    function update(fresh) {
      whole = zoomed === null ? null : ends();
      const x = at == null ? null : u.data[0][at];
      const same = fresh.length === current.length && fresh.every((s, i) => s.label === current[i].label);
      current = fresh;
      if (!same) build();
      else u.setData(align(current), zoomed === null);
      if (x !== null) at = u.valToIdx(x);
      if (zoomed) u.setScale("x", { min: zoomed[0], max: zoomed[1] });
    }

    const chart = { update, show, rebuild: build, remove: () => (charts.delete(chart), u.destroy(), figure.remove()) };
    charts.add(chart);
    build();
    new ResizeObserver(() => u.setSize({ width: Math.max(200, plot.clientWidth), height })).observe(plot);
    return chart;
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.rebuild()));
  const showAll = () => charts.forEach((chart) => chart.show(null));
  return { draw, format, page, showAll };
})();
