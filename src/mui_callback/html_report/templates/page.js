"use strict";
(() => {
  const root = document.documentElement;
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const toggle = document.getElementById("theme");
  const name = () => { toggle.textContent = isDark() ? "Light" : "Dark"; };
  toggle.hidden = false;
  toggle.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();

  for (const slides of document.querySelectorAll(".slides")) {
    const { checkpoints, cells } = JSON.parse(slides.querySelector("script").textContent);
    const [range, output] = [slides.querySelector("input"), slides.querySelector("output")];
    const [task, value] = ["task", "value"].map((one) => slides.querySelector(`select[name=${one}]`));
    const images = slides.querySelectorAll("image.cells");
    const show = () => {
      const shown = cells[value.value][task.selectedIndex][range.value];
      images.forEach((image, kind) => image.setAttribute("href", shown[kind]));
      output.textContent = checkpoints[range.value];
      range.setAttribute("aria-valuetext", checkpoints[range.value]);
    };
    for (const control of [range, task, value]) control.addEventListener("input", show);
    slides.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
    range.value = range.max;
    show();
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const isUp = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
      const isNumber = head.classList.contains("number");
      const raw = (row) => row.cells[column].dataset.raw;
      const order = (a, b) => isNumber ? raw(a) - raw(b) : raw(a).localeCompare(raw(b));
      const rows = [...table.tBodies[0].rows].sort((a, b) =>
        (raw(a) === "") - (raw(b) === "") || (isUp ? 1 : -1) * order(a, b));
      table.tBodies[0].append(...rows);
    }));
  }
  root.dataset.ready = "1";
})();
