// What the page of runs and the list of runs share: elements made from text.
// All that comes from a run (names, prompts, answers, logs) is put in as text, never as markup.
"use strict";
const Page = (() => {
  function make(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) made.setAttribute(name, "");
      else if (value !== false && value != null) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  function put(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  const count = (value) => Math.round(value).toLocaleString("en");

  return { make, put, count };
})();
