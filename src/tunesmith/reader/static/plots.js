// Curves over steps that zoom and can be read, for the report and the live page; drawn by uPlot.
//
//   const chart = Plots.draw(place, {title, unit, zero, series: [{label, group, run, x, y, smoothed, dots, thin}]});
//   chart.update(series)        // new points; a zoom stays
//   Plots.controls(place)       // smoothing and zoom, for all charts of the page
//
// `run` picks color and dashes; `smoothed` is the choice of smoothing ("some", "strong") by which a line is that of the raw one
// with the same label, over steps of the whole run, whatever is zoomed to; `thin` lines have no
// dashes; `dots` marks each point. Lines of one `group` (their label, if not given) are hidden together, in all charts.
// All charts of a page share the read-out's step and the zoom. Drag (mouse or finger) or + zooms in, - out, Esc or a
// double click shows all; the arrow keys move the read-out, with Shift by ten points.
"use strict";
const Plots = (() => {
  const charts = new Set();
  // A page may show another x axis than steps, and may bring finer points for the window that is zoomed to (null: all).
  const page = { x: "step", smoothing: "some", zoomed: (window) => window };
  const hidden = new Set();  // groups
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const COLORS = 8;
  const colorName = (run) => `--series-${run % COLORS}`;
  const DASHES = [[], [8, 3], [2, 3], [10, 3, 2, 3]];
  // After the last color the dashes move on by one, so that 32 runs are told apart.
  const dash = (run) => DASHES[(run + Math.floor(run / COLORS)) % DASHES.length];
  const HEIGHT = 240, SYNC = "step", FAINT = "59";  // a third opaque, as two hexadecimal digits
  const RAW_LINES = 4;  // at most, beside the smoothed ones: more hide each other
  const SAME = 0.005;  // of the height of a chart: lines that are nowhere further apart coincide

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
    if (minutes < 1) return `${Math.floor(value)} s`;
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

  // ---- what is drawn of the series

  // The lines for the chosen smoothing; raw ones under their smoothed ones are faint.
  function linesOf(series) {
    const labels = (smoothed) => new Set(series.filter((s) => Boolean(s.smoothed) === smoothed).map((s) => s.label));
    const raw = labels(false), smoothed = labels(true), lines = [];
    for (const s of series) {
      if (page.smoothing === "none") {
        if (!s.smoothed || !raw.has(s.label)) lines.push(s);
      } else if (s.smoothed) {
        if (s.smoothed === page.smoothing) lines.push(s);
      } else if (!smoothed.has(s.label)) {
        lines.push(s);
      } else if (smoothed.size <= RAW_LINES) {
        lines.push({ ...s, faint: true });
      }
    }
    return markCoinciding(lines);
  }

  const groupOf = (line) => line.group ?? line.label;

  // The y of a line at x, between its points.
  function valueAt(line, x) {
    let low = 0, high = line.x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (line.x[middle] <= x) low = middle;
      else high = middle;
    }
    if (high <= low || line.x[high] === line.x[low]) return line.y[low];
    const share = (x - line.x[low]) / (line.x[high] - line.x[low]);
    return line.y[low] + share * (line.y[high] - line.y[low]);
  }

  function doCoincide(one, other, tolerance) {
    const first = Math.max(one.x[0], other.x[0]), last = Math.min(one.x.at(-1), other.x.at(-1)), POSITIONS = 50;
    if (first > last) return false;
    for (let i = 0; i <= POSITIONS; i++) {
      const x = first + (last - first) * (i / POSITIONS);
      if (Math.abs(valueAt(one, x) - valueAt(other, x)) > tolerance) return false;
    }
    return true;
  }

  // A line that lies on an earlier one is dashed above it, and the earlier one is wider: both are seen.
  function markCoinciding(lines) {
    const bold = lines.filter((line) => !line.faint), values = bold.flatMap((line) => line.y);
    const [low, high] = extremes(values), below = [];
    for (const line of bold) {
      line.sameAs = line.layer = line.isBelow = undefined;
      const other = below.find((earlier) => groupOf(earlier) !== groupOf(line) && doCoincide(earlier, line, SAME * (high - low)));
      if (!other) {
        below.push(line);
        continue;
      }
      other.isBelow = (other.isBelow ?? 0) + 1;
      line.sameAs = other.label;
      line.layer = other.isBelow;
    }
    return lines;
  }

  function extremes(values) {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    return [low, high];
  }

  function dashesOf(line) {
    if (line.sameAs) return [7, 7 * line.layer];
    return line.faint || line.thin || line.isBelow ? [] : dash(line.run);
  }

  function widthOf(line) {
    if (line.faint) return 1;
    if (line.isBelow) return 4;
    return line.thin ? 1.5 : 2;
  }

  // ---- what needs no chart

  // Whether each series has one value only.
  function isConstant(series) {
    return series.every((s) => s.y.every((value) => value === s.y[0]));
  }

  function constantText({ unit, series }) {
    const byLabel = new Map(series.map((s) => [s.label, `${format(s.y[0])}${unit ? ` ${unit}` : ""}`]));
    const values = new Set(byLabel.values());
    if (values.size === 1) return [...values][0];
    return [...byLabel].map(([label, value]) => `${label} ${value}`).join(", ");
  }

  // A line for each chart whose series never change.
  function showConstants(list, constantCharts) {
    list.hidden = constantCharts.length === 0;
    list.replaceChildren(...constantCharts.map((chart) => {
      const row = document.createElement("div"), title = document.createElement("dt"), value = document.createElement("dd");
      title.textContent = chart.title;
      value.textContent = constantText(chart);
      row.append(title, value);
      return row;
    }));
  }

  // ---- a chart as a file

  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  const fileName = (title, ending) => `${title.toLowerCase().replaceAll(/[^a-z0-9]+/g, "-")}.${ending}`;

  function csvCell(value) {
    const text = value == null ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  // The points that are drawn, in the window that is shown.
  function csvOf(u, lines) {
    const { min, max } = u.scales.x, rows = [[nameX(), ...lines.map((line) => (line.faint ? `${line.label}, raw` : line.label))]];
    u.data[0].forEach((x, i) => {
      if (x >= min && x <= max) rows.push(u.data.map((column) => column[i]));
    });
    return rows.map((row) => row.map(csvCell).join(",")).join("\n") + "\n";
  }

  // The curve under its title, with a row for each line.
  function pictureOf(u, title, lines) {
    const scale = devicePixelRatio, row = 20 * scale, plot = u.ctx.canvas, named = lines.filter((line) => !line.faint);
    const picture = document.createElement("canvas"), ink = picture.getContext("2d");
    picture.width = plot.width;
    picture.height = plot.height + row * (named.length + 2);
    ink.fillStyle = css("--page");
    ink.fillRect(0, 0, picture.width, picture.height);
    ink.textBaseline = "middle";
    ink.fillStyle = css("--ink");
    ink.font = `600 ${14 * scale}px system-ui, sans-serif`;
    ink.fillText(title, row / 2, row * 0.75);
    ink.drawImage(plot, 0, row * 1.5);
    ink.font = `${13 * scale}px system-ui, sans-serif`;
    named.forEach((line, i) => {
      const y = plot.height + row * (i + 2);
      ink.strokeStyle = css(colorName(line.run));
      ink.lineWidth = 3 * scale;
      ink.setLineDash(dashesOf(line).map((part) => part * scale));
      ink.beginPath();
      ink.moveTo(row / 2, y);
      ink.lineTo(row * 2, y);
      ink.stroke();
      ink.fillText(line.label, row * 2.5, y);
    });
    return new Promise((resolve) => picture.toBlob(resolve));
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
    let current = linesOf(series), log = false, u = null, at = null, zoomed = null, whole = null;
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
    const png = button("png", `${title}: save as a picture`, async () => save(await pictureOf(u, name.textContent, visible()), fileName(title, "png")));
    const csv = button("csv", `${title}: save the points as a table`, () => save(new Blob([csvOf(u, current)], { type: "text/csv" }), fileName(title, "csv")));
    caption.append(name, scale, png, csv);
    const plot = document.createElement("div"), legend = document.createElement("ul"), said = document.createElement("output");
    plot.className = "plot";
    plot.tabIndex = 0;
    plot.setAttribute("role", "application");
    plot.setAttribute("aria-label", `${name.textContent} over steps. Arrow keys read values, plus and minus zoom, Escape shows all.`);
    legend.className = "legend";
    said.className = "unseen";
    figure.append(caption, plot, legend, said);
    place.append(figure);

    const isShown = (line) => !hidden.has(groupOf(line));
    const visible = () => current.filter(isShown);

    function options() {
      const one = (s) => ({
        label: s.label,
        show: isShown(s),
        stroke: () => css(colorName(s.run)) + (s.faint ? FAINT : ""),
        width: widthOf(s),
        dash: dashesOf(s),
        spanGaps: true,
        points: { show: Boolean(s.dots) || s.x.length < 3, size: 7, fill: () => css("--page") },
      });
      const axis = { stroke: () => css("--soft"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { stroke: () => css("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
      const y = { ...axis, size: 70, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : format(tick))) };
      const padded = (low, high) => uPlot.rangeNum(low, high, 0.08, true).map((end) => (low >= 0 ? Math.max(0, end) : end));
      const range = (_, low, high) => (low == null ? [0, 1] : zero ? [0, high * 1.08 || 1] : padded(low, high));
      return {
        width: Math.max(200, plot.clientWidth), height,
        scales: { x: { time: false }, y: log ? { distr: 3 } : { range } },
        axes: [{ ...axis, size: 32, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? formatX(tick) : "")) }, y],
        series: [{ label: nameX() }, ...current.map(one)],
        legend: { show: false },
        cursor: {
          dataIdx: nearest, drag: { x: true, y: false }, points: { size: 8 },
          sync: { key: SYNC, setSeries: false, scales: ["x", null], filters: { pub: (kind) => kind === "mousemove" || kind === "mouseleave" } },
        },
        hooks: { setScale: [(_, key) => key === "x" && follow()], setCursor: [showValues] },
      };
    }

    function build() {
      u?.destroy();
      buildLegend();
      // A logarithm needs numbers above zero.
      scale.hidden = !current.every((line) => line.y.every((value) => value > 0));
      log &&= !scale.hidden;
      u = new uPlot(options(), align(current), plot);
      showValues(u);
      followTouch(u.over);
      if (zoomed) u.setScale("x", { min: zoomed[0], max: zoomed[1] });
    }

    // A row for each line: its name hides it in all charts, its value is the one pointed at, else the newest.
    function buildLegend() {
      const row = (...parts) => {
        const item = document.createElement("li");
        item.append(...parts);
        return item;
      };
      const value = () => Object.assign(document.createElement("span"), { className: "value" });
      const x = Object.assign(document.createElement("span"), { className: "label", textContent: nameX() });
      const items = [row(x, value())];
      for (const line of current.filter((each) => !each.faint)) {
        const toggle = button(line.label, line.label, () => toggleGroup(groupOf(line)));
        toggle.className = "label";
        toggle.title = `show or hide ${groupOf(line)} in all charts`;
        toggle.setAttribute("aria-pressed", String(isShown(line)));
        toggle.prepend(swatch(line));
        const item = row(toggle, value());
        if (line.sameAs) item.append(Object.assign(document.createElement("small"), { textContent: `same as ${line.sameAs}` }));
        items.push(item);
      }
      legend.replaceChildren(...items);
    }

    function swatch(line) {
      const template = document.createElement("template");
      template.innerHTML = '<svg width="26" height="8" aria-hidden="true"><line x1="1" y1="4" x2="25" y2="4" stroke-width="3"/></svg>';
      const svg = template.content.firstChild, stroke = svg.firstChild;
      stroke.setAttribute("stroke-dasharray", dashesOf(line).join(" ") || "none");
      stroke.style.stroke = `var(${colorName(line.run)})`;
      return svg;
    }

    function showValues(plotted) {
      const pointed = plotted.cursor.idx, cells = legend.querySelectorAll(".value");
      const read = (i) => {
        const column = plotted.data[i];
        return pointed == null ? column.findLast((value) => value != null) : column[nearest(plotted, i, pointed)];
      };
      cells[0].textContent = formatX(read(0));
      let cell = 1;
      current.forEach((line, i) => {
        if (!line.faint) cells[cell++].textContent = format(read(i + 1));
      });
    }

    function showGroups() {
      current.forEach((line, i) => u.setSeries(i + 1, { show: isShown(line) }, false));
      const toggles = legend.querySelectorAll("button");
      current.filter((line) => !line.faint).forEach((line, i) => toggles[i].setAttribute("aria-pressed", String(isShown(line))));
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
      zoomOut.disabled = now === null;
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
      const values = visible().filter((s) => !s.faint).map((s) => {
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
      const shape = (lines) => JSON.stringify(lines.map((line) => [line.label, line.faint, line.sameAs, line.isBelow]));
      const before = shape(current);
      series = fresh;
      current = linesOf(series);
      if (shape(current) !== before) build();
      else u.setData(align(current), zoomed === null);
      showValues(u);
      if (x !== null) at = u.valToIdx(x);
      if (zoomed) u.setScale("x", { min: zoomed[0], max: zoomed[1] });
    }

    function smoothAgain() {
      current = linesOf(series);
      build();
    }

    const chart = { update, show, zoom, showGroups, smoothAgain, rebuild: build };
    charts.add(chart);
    build();
    new ResizeObserver(() => u.setSize({ width: Math.max(200, plot.clientWidth), height })).observe(plot);
    return chart;
  }

  const showAll = () => charts.forEach((chart) => chart.show(null));
  const zoomOut = button("all", "show all steps", showAll);
  zoomOut.disabled = true;

  function toggleGroup(group) {
    if (!hidden.delete(group)) hidden.add(group);
    charts.forEach((chart) => chart.showGroups());
  }

  // Smoothing and zoom of all charts.
  function controls(place) {
    const choices = document.createElement("fieldset"), legend = document.createElement("legend");
    choices.className = "choices";
    legend.textContent = "smoothing";
    choices.append(legend);
    for (const name of ["none", "some", "strong"]) {
      const label = document.createElement("label"), input = document.createElement("input"), text = document.createElement("span");
      Object.assign(input, { type: "radio", name: "smoothing", value: name, checked: name === page.smoothing });
      text.textContent = name;
      label.append(input, text);
      choices.append(label);
    }
    choices.addEventListener("change", (event) => {
      page.smoothing = event.target.value;
      charts.forEach((chart) => chart.smoothAgain());
    });
    const zoom = document.createElement("span"), zoomAll = (factor) => [...charts][0]?.zoom(factor);  // the others follow
    zoom.className = "zoom";
    zoom.append(button("+", "zoom in", () => zoomAll(0.5)), button("−", "zoom out", () => zoomAll(2)), zoomOut);
    place.append(choices, zoom);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.rebuild()));
  return { draw, controls, format, page, showAll, isConstant, showConstants };
})();
