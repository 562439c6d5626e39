"use strict";
// Values are read out of a chart under the pointer or by the arrow keys; a name of the legend hides its line; a click on a
// picture shows it at its own size. All of it is in the page without this.
const number = (value) => (Math.abs(value) >= 1e4 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4))));

for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg[data-x]");
  const cursor = svg.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const names = [...figure.querySelectorAll(".legend bdi")].map((name) => name.textContent);
  const [low, high, start, end, log] = svg.dataset.x.split(" ").map(Number);
  const scale = log ? Math.log10 : (value) => value;
  const pixel = (x) => start + ((scale(x) - scale(low)) / (scale(high) - scale(low))) * (end - start);
  let rows = null; // read when they are first asked for
  let place = -1;

  const read = () => {
    const csv = decodeURIComponent(figure.querySelector("a.save").href.split(",").slice(1).join(","));
    rows = csv.trimEnd().split("\n").slice(1).map((line) => line.split(",").map((cell) => (cell === "" ? null : Number(cell))));
  };
  const show = (wanted) => {
    place = Math.max(0, Math.min(rows.length - 1, wanted));
    const [x, ...values] = rows[place];
    const at = pixel(x).toFixed(1);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    const known = values.map((value, line) => (value === null ? null : `${names[line]} ${number(value)}`));
    readout.textContent = `${number(x)}: ${known.filter((text) => text !== null).join(", ") || "not known"}`;
  };
  svg.addEventListener("pointermove", (event) => {
    if (rows === null) read();
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let best = 0;
    for (const [index, row] of rows.entries()) if (Math.abs(pixel(row[0]) - x) < Math.abs(pixel(rows[best][0]) - x)) best = index;
    show(best);
  });
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    if (rows === null) read();
    show(place + moves[event.key]);
    event.preventDefault();
  });
  for (const button of figure.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      svg.querySelector(`g[data-line="${button.dataset.line}"]`).classList.toggle("hidden", !shown);
    });
  }
}
for (const button of document.querySelectorAll("button.enlarge")) {
  button.addEventListener("click", () => button.setAttribute("aria-expanded", String(button.getAttribute("aria-expanded") !== "true")));
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
document.documentElement.dataset.charts = String(document.querySelectorAll("figure.chart").length); // the script ran to its end
