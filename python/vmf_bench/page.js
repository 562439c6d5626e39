"use strict";
// A click on a column sorts its table; a box of the legend hides a loss in every chart. All numbers are in the page without this.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const column = button.closest("th").cellIndex;
    const body = button.closest("table").tBodies[0];
    const key = (row) => row.cells[column]?.dataset.value ?? "";
    const rising = button.dataset.rising !== "true";
    button.dataset.rising = String(rising);
    const rows = [...body.rows].sort((a, b) => {
      if (key(a) === "" || key(b) === "") return Number(key(a) === "") - Number(key(b) === ""); // those that did not run stay below
      const order = isNaN(key(a)) ? key(a).localeCompare(key(b)) : Number(key(a)) - Number(key(b));
      return rising ? order : -order;
    });
    body.append(...rows);
  });
}
for (const box of document.querySelectorAll(".legend input")) {
  box.addEventListener("change", () => {
    for (const group of document.querySelectorAll("g.series")) {
      if (group.dataset.loss === box.value) group.style.display = box.checked ? "" : "none";
    }
  });
}
const record = JSON.parse(document.getElementById("record").textContent);
document.documentElement.dataset.cases = String(record.cases.length); // the script ran to its end
