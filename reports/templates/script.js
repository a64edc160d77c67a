"use strict";
// Only comfort: sorting and the explorer's filters. The page is complete without it.
document.documentElement.classList.add("js");

for (const button of document.querySelectorAll("button.sort")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), column = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => {
      const cell = row.cells[column];
      return column === 0 ? cell.textContent.trim() : cell.dataset.sort === undefined ? null : Number(cell.dataset.sort);
    };
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null); // what was not measured stays last
      return (typeof x === "string" ? x.localeCompare(y) : x - y) * (down ? -1 : 1);
    };
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
      rows.sort(compare).forEach((row) => body.append(row));
    }
  });
}

const explorer = document.getElementById("explorer");
if (explorer) {
  const field = (name) => explorer.querySelector(`[name=${name}]`);
  const right = (figure) => figure !== null && Number(figure.dataset.score) >= 0.5;
  const apply = () => {
    const task = field("task").value, method = field("method").value, outcome = field("outcome").value;
    const text = field("text").value.toLowerCase(), group = explorer.querySelector("[name=group]:checked");
    let shown = 0;
    for (const card of explorer.querySelectorAll(".sample")) {
      const dense = right(card.querySelector(".mini[data-method=dense]"));
      const row = group && card.querySelector(`.row[data-group="${group.value}"]`);
      let others = row ? [...row.querySelectorAll(".mini")] : [];
      if (method) others = others.filter((figure) => figure.dataset.method === method);
      const wins = others.filter(right).length;
      const matches = {
        "": true,
        "dense-right": dense && others.length > wins,
        "dense-wrong": !dense && wins > 0,
        "all-right": dense && others.length === wins,
        "all-wrong": !dense && wins === 0,
      }[outcome];
      card.hidden = !(matches && (!task || card.dataset.task === task) &&
        (!text || card.textContent.toLowerCase().includes(text)));
      shown += !card.hidden;
    }
    document.getElementById("shown").textContent = shown;
  };
  explorer.addEventListener("input", apply);
  apply();
}
