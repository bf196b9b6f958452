"use strict";
(() => {
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const draw = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const data = JSON.parse(find("#data").textContent);

  // The table of layers: sort, search, filter, unfold.
  const table = find("#layers-table");
  if (table) {
    const body = find("tbody", table);
    const columns = all("thead th", table);
    const rows = all("tr", body).map((row) => ({
      row,
      index: Number(row.dataset.index),
      text: row.textContent.toLowerCase().replace(/\s+/g, " "),
      role: row.dataset.role,
      state: row.dataset.state,
      keys: [...row.cells].map((cell) => {
        const value = cell.dataset.value;
        if (value === undefined) return cell.textContent.trim().toLowerCase();
        return value === "" ? null : Number(value);
      }),
    }));
    const search = find("#layer-search");
    const role = find("#layer-role");
    const state = find("#layer-state");
    const count = find("#layer-count");
    const fold = (button) => {
      button.setAttribute("aria-expanded", "false");
      button.closest("tr").nextElementSibling.remove();
    };
    const foldAll = () => all('button[aria-expanded="true"]', body).forEach(fold);

    const compare = (one, other) => {
      // What is not known comes last, whichever way.
      if (one === null || other === null) return null;
      if (typeof one === "number") return one - other;
      return one.localeCompare(other, undefined, { numeric: true });
    };
    const sortBy = (column, descending) => {
      foldAll();
      const sorted = [...rows].sort((a, b) => {
        const one = a.keys[column];
        const other = b.keys[column];
        const found = compare(one, other);
        if (found === null) return (one === null) - (other === null) || a.index - b.index;
        return (descending ? -found : found) || a.index - b.index;
      });
      body.append(...sorted.map((entry) => entry.row));
      columns.forEach((head, place) =>
        head.setAttribute(
          "aria-sort",
          place !== column ? "none" : descending ? "descending" : "ascending",
        ),
      );
    };
    columns.forEach((head, column) => {
      find("button", head).addEventListener("click", () =>
        sortBy(column, head.getAttribute("aria-sort") === "ascending"),
      );
    });
    const sorter = find("#layer-sort");
    sorter.addEventListener("change", () => {
      const [column, way] = sorter.value.split(" ");
      sortBy(Number(column), way === "down");
    });

    const filter = () => {
      foldAll();
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const entry of rows) {
        const fits =
          (!role.value || entry.role === role.value) &&
          (!state.value || entry.state === state.value) &&
          words.every((word) => entry.text.includes(word));
        entry.row.hidden = !fits;
        shown += fits;
      }
      count.textContent =
        shown === rows.length ? `${shown} layers` : `${shown} of ${rows.length} layers`;
      find("#layer-none").hidden = shown > 0;
    };
    search.addEventListener("input", filter);
    role.addEventListener("change", filter);
    state.addEventListener("change", filter);
    filter();

    const picture = (details) => {
      const heights = atob(details.histogram);
      const end = (heights.length - 1) / 2;
      const figure = make("figure", "levels");
      const svg = draw("svg", {
        class: "hist",
        viewBox: `0 0 ${heights.length} 41`,
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": "weights by level",
      });
      const width = heights.length <= 31 ? 0.82 : 1;
      const bar = (index) =>
        `M${index + (1 - width) / 2} 40v${(-38 * heights.charCodeAt(index)) / 255}h${width}V40z`;
      const others = [...heights].map((_, index) => (index === end ? "" : bar(index)));
      svg.append(draw("path", { class: "zero", d: bar(end) }));
      svg.append(draw("path", { class: "bars", d: others.join("") }));
      const text = `weights by level, −${end} to ${end}; ${(100 * details.zeros).toFixed(1)} % are zero`;
      figure.append(svg, make("figcaption", "", text));
      return figure;
    };
    const unfold = (button) => {
      const row = button.closest("tr");
      const details = data.layers[Number(row.dataset.index) - 1];
      const added = make("tr", "details");
      const cell = make("td");
      cell.colSpan = columns.length;
      const list = make("dl");
      for (const [title, lines] of details.facts) {
        list.append(make("dt", "", title));
        const value = make("dd");
        lines.forEach((line) => value.append(make("div", "", line)));
        list.append(value);
      }
      cell.append(list);
      if (details.histogram) cell.append(picture(details));
      added.append(cell);
      row.after(added);
      button.setAttribute("aria-expanded", "true");
    };
    body.addEventListener("click", (event) => {
      const button = event.target.closest("button.name");
      if (!button) return;
      if (button.getAttribute("aria-expanded") === "true") fold(button);
      else unfold(button);
    });
  }

  // The strip of errors: the layer under the pointer, or the one that the arrow keys reach.
  const strip = find("#strip");
  if (strip) {
    const { names, labels, values } = data.strip;
    const mark = find(".mark", strip);
    const said = find("#strip-said");
    let at = -1;
    const show = (index) => {
      at = Math.max(0, Math.min(names.length - 1, index));
      mark.setAttribute("x", at);
      const found = labels.map((label, row) => {
        const value = values[row][at];
        return `${label} ${value === null ? "–" : `${value.toFixed(1)} dB`}`;
      });
      said.textContent = `${names[at]}: ${found.join(", ")}`;
    };
    strip.addEventListener("pointermove", (event) => {
      const box = strip.getBoundingClientRect();
      show(Math.floor(((event.clientX - box.left) / box.width) * names.length));
    });
    strip.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: names.length }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
    strip.addEventListener("focus", () => show(Math.max(at, 0)));
  }

  // Line charts: values of the step under the pointer.
  for (const chart of all("svg[data-points]")) {
    const points = JSON.parse(chart.dataset.points);
    const said = chart.nextElementSibling;
    const cursor = find(".cursor", chart);
    const first = points.x[0];
    const span = points.x[points.x.length - 1] - first || 1;
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      const share = (x - points.left) / (points.right - points.left);
      const wanted = first + span * Math.max(0, Math.min(1, share));
      let near = 0;
      points.x.forEach((value, index) => {
        if (Math.abs(value - wanted) < Math.abs(points.x[near] - wanted)) near = index;
      });
      const place = points.left + ((points.right - points.left) * (points.x[near] - first)) / span;
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.classList.add("on");
      const values = points.lines.map(([label, line]) => `${label} ${line[near] ?? "–"}`);
      said.textContent = `${points.label} ${points.x[near]}: ${values.join(", ")}`;
    });
    chart.addEventListener("pointerleave", () => cursor.classList.remove("on"));
  }
})();
