// The list of runs: `rows` tells the rows that have changed; each opens the page of its run.
"use strict";
(() => {
  const { make, put, count } = Page;
  const $ = (query) => document.querySelector(query);
  const WIDTH = 120, HEIGHT = 28;  // of a sparkline
  const lines = new Map();  // id -> its row and what is in it
  const chosen = new Set();  // ids

  function addLine(row) {
    const box = make("input", { type: "checkbox", "aria-label": `compare ${row.name}` });
    box.addEventListener("change", () => choose(row.id, box.checked));
    const cells = {};
    for (const name of ["standing", "step", "loss", "val_loss", "spark", "started"]) cells[name] = make("td", { class: name });
    const state = make("span"), damage = make("p", { class: "damage" });
    cells.standing.append(state);
    const title = make("th", { scope: "row" }, make("a", { href: `runs/${row.id}/`, title: row.place }, row.name), damage);
    const element = make("tr", {}, make("td", { class: "pick" }, box), title, ...Object.values(cells));
    return { row, element, cells, state, damage };
  }

  function show(row) {
    if (!lines.has(row.id)) lines.set(row.id, addLine(row));
    const line = lines.get(row.id), { cells, state } = line;
    line.row = row;
    put(state, row.state);
    state.className = `state ${row.state}`;
    put(line.damage, row.damage && `damaged: ${row.damage}`);
    put(cells.step, row.step ? count(row.step) : "–");
    put(cells.loss, number(row.loss));
    put(cells.val_loss, number(row.val_loss));
    put(cells.started, row.started ? new Date(row.started * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" }) : "–");
    cells.spark.innerHTML = `<svg width="${WIDTH}" height="${HEIGHT}" aria-hidden="true"><polyline/></svg>`;
    cells.spark.querySelector("polyline").setAttribute("points", pointsOf(row.spark));
  }

  const number = (value) => (value == null ? "–" : value.toFixed(4));

  function pointsOf(values) {
    const low = Math.min(...values), high = Math.max(...values);
    const x = (i) => (values.length > 1 ? (i / (values.length - 1)) * (WIDTH - 2) + 1 : WIDTH / 2);
    const y = (value) => (high > low ? 2 + (1 - (value - low) / (high - low)) * (HEIGHT - 4) : HEIGHT / 2);
    return values.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  }

  // What runs first, then the newest.
  function order(one, other) {
    const rank = (line) => (line.row.state === "running" ? 0 : 1);
    return rank(one) - rank(other) || other.row.started - one.row.started || one.row.id - other.row.id;
  }

  function arrange() {
    const words = $("#find input").value.toLowerCase().split(/\s+/);
    const sorted = [...lines.values()].sort(order), place = $("#list tbody");
    sorted.forEach((line, i) => {
      const text = `${line.row.place} ${line.row.state}`.toLowerCase();
      line.element.hidden = !words.every((word) => text.includes(word));
      if (place.children[i] !== line.element) place.insertBefore(line.element, place.children[i] ?? null);
    });
    const shown = sorted.filter((line) => !line.element.hidden).length;
    $("#none").hidden = shown > 0;
    put($("#none"), lines.size ? "No run has these words in its folder or state." : "No run yet.");
    put($("#list-title"), shown === lines.size ? `Runs (${shown})` : `Runs (${shown} of ${lines.size})`);
  }

  function choose(id, isChosen) {
    if (isChosen) chosen.add(id);
    else chosen.delete(id);
    const link = $("#compare");
    link.hidden = chosen.size < 2;
    link.href = `runs/${[...chosen].join(",")}/`;
    put(link, `Compare ${chosen.size} runs`);
  }

  let look = 0;  // the last one that was heard

  function hear(told) {
    look = told.look;
    if (!told.rows.length && lines.size) return;
    told.rows.forEach(show);
    arrange();
    document.title = `${lines.size} run${lines.size === 1 ? "" : "s"}: tunesmith watch`;
  }

  $("#find input").addEventListener("input", arrange);
  Live.follow(() => `rows?since=${look}`, hear);
})();
