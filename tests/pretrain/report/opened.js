"use strict";
// What is wrong with the page of each frame, and what it shows; a test reads it as JSON.
const found = {};
const look = (frame) => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const click = (element) => element.dispatchEvent(new view.MouseEvent("click", { bubbles: true }));
  const chart = page.querySelector("figure.chart"), picture = page.querySelector("button.enlarge");
  const result = {
    width: root.scrollWidth,
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    background: view.getComputedStyle(page.body).backgroundColor,
    broken: [...page.images].filter((one) => !one.complete || !one.naturalWidth).length,
    unsaid: [...page.querySelectorAll("img:not([alt]), img[alt=''], svg[role=img]:not([aria-label])")].length,
    foreign: [...page.querySelectorAll("img, script, link, iframe")].filter((one) => {
      const from = one.getAttribute("src") ?? one.getAttribute("href") ?? "";
      return from !== "" && !from.startsWith("data:image/png;base64,");
    }).length,
    title: page.title,
    charts: root.dataset.charts ?? null,
    text: page.body.textContent,
    rows: [...page.querySelectorAll("tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent)),
    saved: [...page.querySelectorAll("a.save")].map((one) => [one.download, decodeURIComponent(one.href.split(",").slice(1).join(","))]),
    headings: [...page.querySelectorAll("h1, h2")].map((one) => one.textContent),
    sideways: [...page.querySelectorAll("body *")].filter((one) => one.getBoundingClientRect().right > root.clientWidth + 1 && !one.closest(".scroll, pre, .enlarge, svg, summary")).length,
  };
  if (chart) {
    const svg = chart.querySelector("svg[data-x]"), button = chart.querySelector(".legend button");
    const line = svg.querySelector("g.line");
    svg.scrollIntoView();
    const box = svg.getBoundingClientRect();
    svg.dispatchEvent(new view.PointerEvent("pointermove", { clientX: box.right - 1, clientY: box.top + 5, bubbles: true }));
    result.pointed = chart.querySelector(".readout").textContent;
    svg.dispatchEvent(new view.KeyboardEvent("keydown", { key: "Home", bubbles: true }));
    result.keyed = chart.querySelector(".readout").textContent;
    click(button);
    result.hidden = view.getComputedStyle(line).display;
    click(button);
    result.shown = view.getComputedStyle(line).display;
  }
  if (picture) {
    click(picture);
    result.enlarged = picture.getAttribute("aria-expanded");
    click(picture);
  }
  return result;
};
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    try { found[frame.name] = look(frame); } catch (error) { found[frame.name] = { error: String(error) }; }
  }
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
