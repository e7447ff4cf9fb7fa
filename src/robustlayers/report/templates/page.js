"use strict";
// The page is complete without this: it only sorts tables by a click on a head, and unfolds the arms for print.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const key = (body) => {
      const cell = body.rows[0].cells[column];
      return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
    };
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numeric;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const known = (body) => !numeric || typeof key(body) === "number";
      const bodies = [...table.tBodies].sort((a, b) => {
        if (known(a) !== known(b)) return known(a) ? -1 : 1; // what was not measured stays below
        const order = numeric ? (known(a) ? key(a) - key(b) : 0) : key(a).localeCompare(key(b));
        return down ? -order : order;
      });
      table.append(...bodies);
    });
  });
}
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open]):not(.tensors)")];
  opened.forEach((one) => { one.open = true; });
});
addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
