// Draws the report's curves; those of "More curves" when they are first shown, so that the page opens at once.
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const draw = (place) => {
    const into = document.getElementById(place), here = charts.filter((chart) => chart.place === place);
    for (const chart of here) if (!Plots.isConstant(chart.series)) Plots.draw(into, chart);
    Plots.showConstants(document.getElementById(`${place}-constant`), here.filter((chart) => Plots.isConstant(chart.series)));
  };
  Plots.controls(document.getElementById("controls"));
  draw("main");
  const rest = document.getElementById("rest");
  rest.hidden = !charts.some((one) => one.place === "more");
  rest.addEventListener("toggle", () => draw("more"), { once: true });
})();
