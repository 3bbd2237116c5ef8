// Draws the report's curves; those of "More curves" when they are first shown, so that the page opens at once.
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const draw = (place) => {
    const into = document.getElementById(place);
    for (const chart of charts.filter((one) => one.place === place)) Plots.draw(into, chart);
  };
  draw("main");
  const rest = document.getElementById("rest");
  rest.hidden = !charts.some((one) => one.place === "more");
  rest.addEventListener("toggle", () => draw("more"), { once: true });
})();
