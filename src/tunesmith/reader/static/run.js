// The page of runs. A live one asks each second where the runs stand, and for `curves`, `texts` and the written sections
// when that has changed; a report holds all of it.
"use strict";
(() => {
  const { make, put, count } = Page;
  const embedded = document.getElementById("data");
  const report = embedded && JSON.parse(embedded.textContent);
  const $ = (query) => document.querySelector(query);
  const RANKS = 8;  // at most, in one chart
  const MAX_SHARE = 0.02;  // of the time goes into curves without a request: those of a long run come less often
  const charts = new Map();  // title -> chart
  const slots = new Map();  // title -> its place, which stays empty while the values are constant
  let runs = [], texts = [], zoomed = null, axis = "step", drawn = "step", later = null, drawnAt = -Infinity, rest = 0, waiting = false, stale = false, read = "", written = null, sampleSteps = [];

  const percent = (value) => `${(value * 100).toFixed(value < 0.0995 ? 1 : 0)}`;

  // Seconds as tunesmith's log writes them: 42 s, 3:07 min, 2:05 h.
  function duration(seconds) {
    const whole = Math.round(seconds), two = (value) => String(value).padStart(2, "0");
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)}:${two(whole % 60)} min`;
    return `${Math.floor(whole / 3600)}:${two(Math.floor((whole % 3600) / 60))} h`;
  }

  // ---- where each run stands

  const FIGURES = [
    ["loss", "Loss", (v) => v.toFixed(4)],
    ["val_loss", "Validation loss", (v) => v.toFixed(4)],
    ["tokens_per_second", "Tokens/s", count],
    ["mfu", "MFU", percent, "%"],
    ["memory_gib", "Memory", (v) => v.toFixed(1), "GiB"],
    ["host_memory_percent", "Host memory", (v) => v.toFixed(0), "%"],
    ["gpu_utilization", "GPU", (v) => v.toFixed(0), "%"],
    ["gpu_power_watts", "Power", count, "W"],
    ["gpu_temperature_celsius", "Temperature", (v) => v.toFixed(0), "°C"],
    ["network_bytes_per_second", "Network", (v) => count(v / 1e6), "MB/s"],
    ["nvlink_bytes_per_second", "NVLink", (v) => (v / 1e9).toFixed(1), "GB/s"],
    ["data_share", "Wait for data", percent, "%"],
    ["idle_share", "Imbalance", percent, "%"],
  ];

  function runCard(index) {
    const card = make("article", { class: "run", "aria-labelledby": `run-${index}` });
    card.style.setProperty("--series", `var(--series-${index % 8})`);
    const parts = {
      card, name: make("h2", { id: `run-${index}` }), state: make("span", { class: "state" }), where: make("span", { class: "where" }),
      place: make("p", { class: "place" }), bar: make("i"), figures: make("dl", { class: "figures" }), notes: make("div"), told: "",
    };
    parts.track = make("div", { class: "track", role: "progressbar", "aria-label": "progress", "aria-valuemin": 0, "aria-valuemax": 100 }, parts.bar);
    const head = make("div", { class: "head" });
    if (runs.length > 1) head.append(make("span", { class: "swatch" }));
    head.append(parts.name, parts.state, parts.where);
    card.append(head, parts.place, parts.track, parts.figures, parts.notes);
    $("#runs").append(card);
    parts.values = new Map();
    return parts;
  }

  const cards = [];

  function showRun(run, index) {
    const parts = (cards[index] ??= runCard(index));
    put(parts.name, run.name);
    put(parts.place, run.place);
    put(parts.state, run.state);
    parts.state.className = `state ${run.state}`;
    const steps = run.steps ? `step ${count(run.step)} of ${count(run.steps)}` : run.step ? `step ${count(run.step)}` : "before the first step";
    const isBestEarlier = run.state === "finished" && run.final_step != null && run.final_step !== run.step;
    const weights = isBestEarlier ? `, final/ is of step ${count(run.final_step)}` : "";
    put(parts.where, run.seconds_left == null ? steps + weights : `${steps}, ${duration(run.seconds_left)} left`);
    const done = Math.round((run.done ?? 0) * 100);
    parts.bar.style.width = `${(run.done ?? 0) * 100}%`;
    parts.track.setAttribute("aria-valuenow", done);
    parts.track.setAttribute("aria-label", `progress of ${run.name}`);
    for (const [field, label, format, unit] of FIGURES) {
      const value = run.figures[field];
      if (!Number.isFinite(value)) continue;
      if (!parts.values.has(field)) {
        const number = make("span");
        parts.values.set(field, number);
        parts.figures.append(make("div", {}, make("dt", {}, label), make("dd", {}, number, unit ? make("small", {}, ` ${unit}`) : "")));
      }
      put(parts.values.get(field), format(value));
    }
    showNotes(run, parts);
  }

  function showNotes(run, parts) {
    const told = JSON.stringify([run.end, run.warnings, run.damaged]);
    if (parts.told === told) return;
    parts.told = told;
    parts.notes.replaceChildren();
    const rows = Object.entries(run.end);
    if (rows.length) {
      const list = make("dl");
      for (const [key, value] of rows) {
        const gib = /[._]bytes$/.test(key) && typeof value === "number";
        const text = gib ? `${(value / 2 ** 30).toFixed(1)} GiB` : asText(value);
        const shown = key === "next" ? typed(text) : [text];
        list.append(make("dt", {}, key.replace(/^figures\.|_bytes$/g, "").replaceAll(/[._]/g, " ")), make("dd", {}, ...shown));
      }
      parts.notes.append(make("div", { class: `note ${run.state === "stopped" ? "" : "bad"}` }, list));
    }
    if (run.damaged.length) {
      const list = make("ul", { "aria-label": "damaged files" });
      for (const file of run.damaged) {
        const count = file.lines === 1 ? "1 line was skipped" : `${file.lines} lines were skipped`;
        list.append(make("li", {}, file.lines == null ? `${file.file}: ${file.why}` : `${file.file}: ${count}; ${file.why}`));
      }
      parts.notes.append(make("div", { class: "note" }, make("p", {}, "Not read, because it is damaged:"), list));
    }
    if (run.warnings.length) {
      const list = make("ul", { "aria-label": "warnings" });
      for (const line of run.warnings) list.append(make("li", {}, line));
      const title = `${run.warnings.length} warning${run.warnings.length > 1 ? "s" : ""}`;
      // Those of a run that is over are to be found, not to be acted on.
      parts.notes.append(make("details", { class: run.state === "running" ? "note" : "note calm", open: run.state === "running" }, make("summary", {}, title), list));
    }
  }

  // A fix as what is typed and the comment behind it: not every shell takes comments.
  function typed(fix) {
    const [command, comment] = fix.split(/ {3}# /);
    return [make("code", { class: "typed" }, command), ...(comment ? [` (${comment})`] : [])];
  }

  function asText(value) {
    if (value === null) return "–";
    return typeof value === "object" ? JSON.stringify(value) : String(value);
  }

  // ---- curves

  const isOfValidation = (series) => series.field.startsWith("val_");

  // Two runs may have the same name in different folders.
  function runName(index) {
    const isUnique = runs.filter((run) => run.name === runs[index].name).length === 1;
    return isUnique ? runs[index].name : runs[index].place;
  }

  function name(series, panel) {
    const of = runs.length > 1 ? [runName(series.run)] : [];
    if (runs.length === 1 && panel.series.some((other) => other.rank)) of.push(`rank ${series.rank ?? 0}`);
    else if (new Set(panel.series.map((other) => other.field)).size > 1) of.push(series.field);
    // The values of a panel with a unit may be other multiples than those of the field.
    else if (of.length === 0) of.push(panel.unit ? `${panel.title} (${panel.unit})` : series.field);
    return of.join(" ");
  }

  // Several runs: a color each, and rank 0 alone. One run: a color for each rank, and one for the validation.
  function lines(panel) {
    const several = runs.length > 1;
    const shown = several ? panel.series.filter((s) => !s.rank) : outermost(panel.series);
    return shown.map((s) => ({
      label: name(s, panel), group: several ? runName(s.run) : null, x: s.x, y: s.y, smoothed: s.smoothed,
      dots: isOfValidation(s), thin: !several, run: several ? s.run : isOfValidation(s) ? 1 : s.rank ?? 0,
    }));
  }

  // Of more than RANKS ranks: rank 0, and those with the lowest and the highest mean.
  function outermost(series) {
    const others = series.filter((s) => s.rank), mean = (s) => s.y.reduce((sum, value) => sum + value, 0) / s.y.length;
    if (others.length < RANKS) return series;
    const sorted = [...others].sort((a, b) => mean(a) - mean(b)), kept = [...sorted.slice(0, 3), ...sorted.slice(-3)];
    return series.filter((s) => !s.rank || kept.includes(s));
  }

  // `curves` or `texts`, with what is asked of a live page.
  const get = async (part, query = "") => (report ? report[part] : Live.getJson(part + query));

  function windowed() {
    return zoomed ? `&from=${zoomed[0]}&to=${zoomed[1]}` : "";
  }

  // One request at a time: what changes meanwhile is asked for after it.
  async function drawCurves() {
    if (document.hidden || waiting) {
      stale = true;
      later = null;
      return;
    }
    let pause = 20;
    const askedAt = performance.now();
    waiting = true;
    stale = false;
    clearTimeout(later);
    later = null;
    try {
      const points = Math.min(2000, Math.round(0.7 * innerWidth * devicePixelRatio));
      const asked = axis, window = zoomed, panels = await get("curves", `?x=${axis}&points=${points}${windowed()}`);
      if (asked !== axis || window !== zoomed) stale = true;
      else showPanels(panels, drawn !== axis);
      drawn = asked;
    } catch {
      pause = 2000;  // the link says so
      stale = true;
    }
    waiting = false;
    drawnAt = performance.now();
    rest = Math.min(30000, (drawnAt - askedAt) / MAX_SHARE);  // a slow network is no long run
    if (stale) setTimeout(drawCurves, pause);
  }

  function showPanels(panels, anew) {
    $("#empty").hidden = panels.length > 0;
    const constant = [];
    for (const panel of panels) {
      const { title, unit } = panel, series = lines(panel);
      if (!slots.has(title)) slots.set(title, $("#charts").appendChild(make("div", { class: "slot" })));
      if (charts.has(title)) {
        charts.get(title).update(series);
        if (anew) charts.get(title).rebuild();
      } else if (Plots.isConstant(series)) {
        constant.push({ title, unit, series });
      } else {
        const zero = unit === "%" || ["tokens/s", "GiB", "W", "ms"].includes(unit);
        charts.set(title, Plots.draw(slots.get(title), { title, unit, zero, series, height: 220 }));
      }
    }
    Plots.showConstants($("#constants"), constant);
  }

  // ---- texts: samples, log

  function showSamples() {
    const range = $("#when input"), newest = Number(range.value) >= sampleSteps.length - 1;
    const shown = runs.map((run) => run.final_step).filter((step) => step != null);
    sampleSteps = [...new Set(all().map((row) => row.step))].sort((a, b) => a - b);
    range.max = Math.max(0, sampleSteps.length - 1);
    // The answers of the final weights, or the newest; an older step that was chosen stays.
    const final = sampleSteps.indexOf(Math.max(...shown));
    if (newest) range.value = final >= 0 ? final : range.max;
    $("#when").hidden = sampleSteps.length < 2;
    showAnswers();
  }

  function showAnswers() {
    const step = sampleSteps[Number($("#when input").value)], place = $("#answers");
    place.replaceChildren();
    texts.forEach((text, index) => text.missing && place.append(make("p", { class: "soft" }, `${runName(index)}: ${text.missing}.`)));
    if (step == null) {
      if (!place.children.length) place.append(make("p", { class: "soft" }, "No samples yet: log.samples=4 lets the model answer four prompts at each validation."));
      return;
    }
    put($("#when output"), count(step));
    $("#when input").setAttribute("aria-valuetext", `step ${step}`);
    const conversations = Object.assign({}, ...texts.map((text) => text.conversations));
    const systems = new Set(texts.map((text) => text.system).filter(Boolean));
    for (const system of systems) {
      place.append(make("details", {}, make("summary", {}, "System prompt of all"), make("p", { class: "turn system" }, system)));
    }
    for (const [prompt, turns] of Object.entries(conversations)) {
      const rows = all().filter((row) => row.prompt === prompt), answers = make("div", { class: "answers" });
      const expected = rows.find((row) => row.expected), from = rows.find((row) => row.row);
      if (expected) answers.append(answer("the row's own answer", "expected", expected.expected));
      if (step) showFirstAnswers(answers, prompt);
      texts.forEach((text, index) => showAnswer(answers, text.samples.filter((row) => row.prompt === prompt && row.step <= step), index));
      const title = make("h3", { class: from ? null : "unseen" }, from ? from.row : "A sample");
      place.append(make("article", { class: "sample" }, title, ...turns.map(bubble), answers));
    }
  }

  const all = () => texts.flatMap((text) => text.samples);
  const answer = (by, kind, ...text) => make("div", { class: `turn assistant answer ${kind}` }, make("span", { class: "role" }, by), ...text);

  // Before training all runs have the same model: one answer stands for all that agree.
  function showFirstAnswers(answers, prompt) {
    const firsts = texts.map((text) => text.samples.find((row) => row.prompt === prompt && row.step === 0)?.answer);
    if (new Set(firsts).size === 1 && firsts[0] != null) answers.append(answer("before training", "before", firsts[0]));
    else firsts.forEach((text, index) => text != null && answers.append(answer(`${runName(index)}, before training`, "before", text)));
  }

  function bubble([role, text]) {
    return make("p", { class: `turn ${role}`, tabindex: 0 }, make("span", { class: "role" }, role), text);
  }

  // The newest of a run's answers to a prompt.
  function showAnswer(answers, rows, index) {
    if (!rows.length) return;
    const before = rows.at(-2), now = rows.at(-1);
    const by = `${runs.length > 1 ? `${runName(index)}, ` : ""}${now.step ? `step ${count(now.step)}` : "before training"}`;
    answers.append(answer(by, "", ...changes(before?.answer, now.answer)));
  }

  // The words of an answer; those that the answer before did not have, in this order, are marked.
  function changes(before, now) {
    const words = now.match(/\s+|\S+/g) ?? [];
    if (before == null || words.length > 600) return [now];
    const old = before.match(/\S+/g) ?? [], fresh = words.filter((word) => word.trim());
    const common = Array.from({ length: old.length + 1 }, () => new Uint16Array(fresh.length + 1));
    for (let i = old.length - 1; i >= 0; i--) {
      for (let j = fresh.length - 1; j >= 0; j--) {
        common[i][j] = old[i] === fresh[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
      }
    }
    const kept = new Set();
    for (let i = 0, j = 0; i < old.length && j < fresh.length;) {
      if (old[i] === fresh[j]) kept.add(j), i++, j++;
      else if (common[i + 1][j] >= common[i][j + 1]) i++;
      else j++;
    }
    let at = 0;
    return words.map((word) => (!word.trim() || kept.has(at++) ? word : make("mark", {}, word)));
  }

  const logs = [];

  function showLog(run, index) {
    if (!logs[index]) {
      const block = make("pre", { tabindex: 0, role: "region", "aria-label": `end of the log of ${run.name}` });
      logs[index] = { block, told: null };
      $("#lines").append(...(runs.length > 1 ? [make("h3", {}, run.name)] : []), block);
    }
    const { block, told } = logs[index];
    if (told === run.log.join("\n")) return;
    logs[index].told = run.log.join("\n");
    const end = block.scrollTop + block.clientHeight >= block.scrollHeight - 8;  // whoever reads further up stays there
    block.replaceChildren(...run.log.map((line) => make("span", { class: line.includes("warning: ") ? "warning" : null }, `${line}\n`)));
    if (end || told === null) block.scrollTop = block.scrollHeight;
  }

  async function getTexts() {
    const now = runs.map((run) => run.texts).join();
    if (document.hidden || now === read) return;
    try {
      texts = await get("texts");
    } catch {
      return;
    }
    read = now;
    showSamples();
  }

  async function getSections() {
    const now = JSON.stringify(runs.map((run) => [run.texts, run.state, run.figures.val_loss]));
    if (report || document.hidden || now === written) return;
    const isFirst = written === null;  // the page came with them
    written = now;
    try {
      if (!isFirst) await Live.refreshSections();
    } catch {
      written = "";
    }
  }

  // ---- what the runs say

  // What cannot be shown of one run must not keep the others, and what comes later, from the page.
  function apart(show) {
    return (run, index) => {
      try {
        show(run, index);
      } catch (error) {
        console.error(error);
      }
    };
  }

  function hear(told) {
    runs = told.runs;
    runs.forEach(apart(showRun));
    runs.forEach(apart(showLog));
    const first = runs[0], done = first.done == null ? "" : `${Math.round(first.done * 100)} % `;
    if (!report) document.title = runs.length > 1 ? `${runs.length} runs: tunesmith watch` : `${done}${first.name}: tunesmith watch`;
    if (!later) later = setTimeout(drawCurves, Math.max(0, drawnAt + rest - performance.now()));
    getTexts();
    getSections();
  }

  $("#axis").addEventListener("change", (event) => {
    Plots.showAll();
    axis = Plots.page.x = event.target.value;
    drawCurves();
  });
  Plots.page.zoomed = (window) => {
    zoomed = window;
    if (!report) drawCurves();  // with finer points
  };
  Plots.controls($("#controls"));
  $("#when input").addEventListener("input", showAnswers);
  document.addEventListener("visibilitychange", () => !document.hidden && (drawCurves(), getTexts(), getSections()));
  $("#axis").hidden = Boolean(report);  // it has the points over steps
  if (report) hear(report);
  else {
    $("#all-runs").hidden = !/\/runs\/[^/]+\/$/.test(location.pathname);
    Live.follow(() => "state", hear);
  }
})();
