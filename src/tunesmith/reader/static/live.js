// What a live page asks the command for; a report has no such link.
"use strict";
const Live = (() => {
  const LOOK_MS = 1000;  // between two looks

  // Calls `hear` with what the answer to `path()` says, whenever that has changed.
  function follow(path, hear) {
    const link = document.querySelector("#link");
    let last = "";
    async function look() {
      let now = last;
      try {
        now = await (await ask(path())).text();
        link.className = "";
        Page.put(link, "live");
      } catch {
        link.className = "lost";
        Page.put(link, "not live: tunesmith watch has ended");
      }
      setTimeout(look, LOOK_MS);
      if (now !== last) hear(JSON.parse(now));
      last = now;
    }
    look();
  }

  async function ask(path) {
    const answer = await fetch(path);
    if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
    return answer;
  }

  const getJson = async (path) => (await ask(path)).json();

  // The sections that the command has written, as they are now; those that changed are replaced.
  const sections = new Map();
  async function refreshSections() {
    const page = new DOMParser().parseFromString(await (await ask("")).text(), "text/html");
    for (const fresh of page.querySelectorAll("section.written")) {
      const html = fresh.outerHTML, old = document.getElementById(fresh.id);
      if ((sections.get(fresh.id) ?? old.outerHTML) !== html) old.replaceWith(fresh);
      sections.set(fresh.id, html);
    }
  }

  return { follow, getJson, refreshSections };
})();
