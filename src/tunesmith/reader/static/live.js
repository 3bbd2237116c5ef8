// What a live page asks the command for; a report has no such link.
"use strict";
const Live = (() => {
  // Calls `hear` with what each event says.
  function connect(hear) {
    const source = new EventSource("events"), link = document.querySelector("#link");
    source.onopen = () => {
      link.className = "";
      Page.put(link, "live");
    };
    source.onmessage = (event) => hear(JSON.parse(event.data));
    source.onerror = () => {
      link.className = "lost";
      Page.put(link, "not live: tunesmith watch has ended");
    };
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

  return { connect, getJson, refreshSections };
})();
