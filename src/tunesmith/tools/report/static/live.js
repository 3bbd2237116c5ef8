// A page of `tunesmith watch` asks whether the runs' files have changed, and then shows what is new.
"use strict";
(() => {
  const PAUSE_MS = 2000, MAX_LOAD = 0.1;  // the part of the time that the server may spend on answers
  const link = document.getElementById("link");
  const shown = new Map();  // the id of a section -> its HTML as the server sent it
  let tag = "";

  async function look() {
    const began = performance.now();
    try {
      const answer = await fetch("", { headers: { "if-none-match": tag } });
      if (answer.status === 200) show(new DOMParser().parseFromString(await answer.text(), "text/html"));
      else if (answer.status !== 304) throw new Error(answer.status);
      tag = answer.headers.get("etag");
      link.className = "";
      link.textContent = "live";
    } catch {
      link.className = "lost";
      link.textContent = "not live: tunesmith watch has ended";
    }
    setTimeout(look, Math.max(PAUSE_MS, (performance.now() - began) / MAX_LOAD));
  }

  // Sections that have not changed stay, so that what a reader has opened stays open.
  function show(page) {
    for (const fresh of page.querySelectorAll("main > section:not(#curves), #data")) {
      const old = document.getElementById(fresh.id), html = fresh.outerHTML;
      if (!old) continue;
      if (html !== (shown.get(fresh.id) ?? old.outerHTML)) old.replaceWith(fresh);
      shown.set(fresh.id, html);
    }
    Curves.drawAll();
  }

  setTimeout(look, PAUSE_MS);
})();
