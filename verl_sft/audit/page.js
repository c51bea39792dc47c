"use strict";
// All text goes in as text nodes: rows are a stranger's and may hold markup.
const data = JSON.parse(document.getElementById("data").textContent);
const make = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};
const table = (head, rows) => {
  const node = make("table");
  for (const cells of [head, ...rows]) {
    const line = node.appendChild(make("tr"));
    for (const cell of cells) line.appendChild(make(cells === head ? "th" : "td", String(cell)));
  }
  return node;
};
const svg = (tag, values) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const key in values) node.setAttribute(key, values[key]);
  return node;
};

function chart(title, histogram) {
  const box = make("div"), width = 360, height = 110, counts = histogram.counts;
  box.appendChild(make("h2", title));
  const picture = box.appendChild(svg("svg", { width, height: height + 16 }));
  const most = Math.max(1, ...counts), step = width / Math.max(1, counts.length);
  counts.forEach((count, i) => {
    const size = (height - 6) * count / most;
    const bar = svg("rect", { x: i * step, y: height - size, width: step - 1, height: size });
    const hint = bar.appendChild(svg("title", {}));
    hint.textContent = `${histogram.edges[i]} to ${histogram.edges[i + 1]}: ${count}`;
    picture.appendChild(bar);
  });
  if (counts.length) {
    picture.appendChild(svg("text", { x: 2, y: height + 12 })).textContent = histogram.edges[0];
    const end = svg("text", { x: width - 2, y: height + 12, "text-anchor": "end" });
    picture.appendChild(end).textContent = histogram.edges[counts.length];
  }
  return box;
}

function tokens(sample) {
  const box = make("div", undefined, "tokens");
  let at = 0;
  for (const [count, weight] of sample.weights) {
    const kind = weight === 0 ? "" : weight === 1 ? " learned" : weight < 0 ? " negative" : " part";
    for (let i = 0; i < count; i++, at++) {
      const text = sample.texts[at] === "" ? "\u00b7" : sample.texts[at].replace(/\n/g, "\u21b5\n");
      const node = make("span", text, "t" + kind);
      node.title = `id ${sample.ids[at]}, weight ${weight}, position ${at}`;
      box.appendChild(node);
    }
  }
  if (at < sample.tokens) box.appendChild(make("em", ` ... ${sample.tokens - at} more tokens`));
  return box;
}

function entry(sample, open) {
  const node = make("details");
  const head = node.appendChild(make("summary"));
  const words = [sample.source, sample.task_type, `${sample.learned} of ${sample.tokens} tokens learned`];
  head.appendChild(make("span", words.filter(Boolean).join(" | ")));
  for (const mark of sample.marks) head.appendChild(make("span", mark, "mark"));
  if (sample.success === false) head.appendChild(make("span", "failed episode", "mark failed"));
  head.title = `record ${sample.name}`;
  const fill = () => { if (node.open && node.children.length === 1) node.appendChild(tokens(sample)); };
  node.addEventListener("toggle", fill);
  node.open = open;
  fill();
  return node;
}

const refused = data.audit.refused_rows;
const filters = {
  all: ["All", data.samples],
  truncated: ["Truncated", data.samples.filter(s => s.cut)],
  failed: ["Failed episodes", data.samples.filter(s => s.success === false)],
  refused: ["Refused", refused],
};

function show() {
  const asked = location.hash.slice(1), chosen = asked in filters ? asked : "all";
  const list = document.getElementById("list");
  list.replaceChildren();
  document.querySelectorAll("nav button").forEach(b => b.className = b.value === chosen ? "on" : "");
  const items = filters[chosen][1], figures = data.audit.figures;
  document.getElementById("note").textContent = chosen === "refused"
    ? `${refused.length} of ${figures.refused} refused rows are listed.`
    : `The page holds ${data.samples.length} of ${figures.samples} samples` +
      (data.left_out ? `; ${data.left_out} more were chosen but are too long for it.` : ".");
  if (!items.length) list.appendChild(make("p", "None."));
  else if (chosen === "refused") {
    list.appendChild(table(["row", "field", "code", "reason", "fix"],
      items.map(r => [r.where, r.field, r.code, r.reason, r.fix])));
  } else items.forEach((sample, i) => list.appendChild(entry(sample, i < 3)));
}

document.getElementById("model").textContent = `${data.audit.model} | ${data.audit.files.join(", ")}`;
document.getElementById("lines").textContent = data.audit.lines.join("\n");
for (const title in data.audit.histograms) {
  document.getElementById("charts").appendChild(chart(title, data.audit.histograms[title]));
}
const kinds = Object.entries(data.audit.success_by_task_type);
if (kinds.length) {
  const outcomes = document.getElementById("outcomes");
  outcomes.appendChild(make("h2", "Success by task type"));
  outcomes.appendChild(table(["task type", "episodes", "successes", "share"], kinds.map(([k, c]) => {
    const known = c.episodes - c.unknown;
    return [k, c.episodes, c.successes, known ? `${(100 * c.successes / known).toFixed(1)} %` : "unknown"];
  })));
}
for (const name in filters) {
  const button = make("button", `${filters[name][0]} (${name === "refused" ? data.audit.figures.refused : filters[name][1].length})`);
  button.value = name;
  button.addEventListener("click", () => { location.hash = name; });
  document.getElementById("filters").appendChild(button);
}
addEventListener("hashchange", show);
show();
