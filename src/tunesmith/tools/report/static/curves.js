// Draws the charts of the page with uPlot. A zoom and the pointer's step are those of all charts.
"use strict";
const Curves = (() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (line) => css(`--series-${line.color}`) + (line.look === "raw" ? "59" : "");  // 59: a third opaque
  const WIDTHS = { raw: 1, smooth: 2, dots: 2 };
  let charts = [], zoom = null;

  // A number in 4 significant digits: 2.314, 0.0001, 12,480, 1.2e-7.
  function format(value) {
    const size = Math.abs(value);
    if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    return size !== 0 && size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }

  // The index of the value of a line that is nearest to an index of the common steps.
  function nearest(chart, line, index) {
    const has = (i) => chart.data[line][i] != null;
    for (let far = 0; far < chart.data[0].length; far++) {
      if (has(index - far)) return index - far;
      if (has(index + far)) return index + far;
    }
    return index;
  }

  // The legend's text: the value at the pointer or the last one, and the step of that value.
  function valueAt(chart, value, line) {
    const last = chart.data[0].length - 1;
    const index = nearest(chart, line, chart.cursor.idx ?? last);
    return `${format(chart.data[line][index])} at step ${chart.data[0][index].toLocaleString("en")}`;
  }

  function keepZoom(chart, scale) {
    if (scale !== "x") return;
    const { min, max } = chart.scales.x, steps = chart.data[0];
    zoom = min > steps[0] || max < steps.at(-1) ? { min, max } : null;
  }

  function draw(place, { title, from_zero: fromZero, series }) {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    figure.className = "chart";
    caption.textContent = title;
    figure.append(caption);
    place.append(figure);
    const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 } };
    const padded = (low, high) => uPlot.rangeNum(low, high, 0.08, true).map((end) => (low >= 0 ? Math.max(0, end) : end));
    const options = {
      width: figure.clientWidth, height: 220,
      scales: { x: { time: false }, y: { range: (_, low, high) => (low == null ? [0, 1] : fromZero ? [0, high * 1.08 || 1] : padded(low, high)) } },
      axes: [axis, { ...axis, size: 70, values: (_, ticks) => ticks.map(format) }],
      series: [{}, ...series.map((line) => ({
        label: line.label, stroke: color(line), width: WIDTHS[line.look], spanGaps: true, value: valueAt,
        points: { show: line.look === "dots" || line.x.length < 3, size: 7 },
      }))],
      cursor: { dataIdx: nearest, drag: { x: true, y: false }, sync: { key: "steps", setSeries: true, scales: ["x", null] } },
      hooks: { setScale: [keepZoom] },
    };
    const chart = new uPlot(options, uPlot.join(series.map((line) => [line.x, line.y])), figure);
    charts.push({ chart, figure });
  }

  function drawAll() {
    const place = document.getElementById("charts"), window = zoom;
    charts.forEach(({ chart }) => chart.destroy());
    charts = [];
    place.replaceChildren();
    for (const panel of JSON.parse(document.getElementById("data").textContent)) draw(place, panel);
    if (window) charts.forEach(({ chart }) => chart.setScale("x", window));
  }

  addEventListener("resize", () => charts.forEach(({ chart, figure }) => chart.setSize({ width: figure.clientWidth, height: 220 })));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
  return { drawAll };
})();
