// The viewer of queries and their matches, and the hints of the map. An image is given by its row: its name is data.names[row].
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 8;
const at = (id) => document.getElementById(id);
const queries = data.matches.map((_, query) => query);
let shown = [];
let page = 0;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const labelOf = (row) => data.classes[data.labels[row]];
const isRight = (query) => data.first[query] === 1;

function picture(row, what) {
  const box = element("span", "picture");
  const label = data.labelled ? `, ${labelOf(row) || "no class"}` : "";
  if (data.pictures[row]) {
    const image = element("img");
    image.src = `data:image/webp;base64,${data.pictures[row]}`;
    image.alt = `${what}: ${data.names[row]}${label}`;
    box.append(image);
  } else {
    box.textContent = row in data.pictures ? "cannot be read" : "no picture";
  }
  return box;
}

function matchItem(query, rank) {
  const row = data.matches[query][rank];
  const right = data.labelled ? labelOf(row) === labelOf(query) : null;
  const item = element("li", right === null ? "" : right ? "right" : "wrong");
  item.title = data.names[row];
  const mark = right === null ? "" : right ? "✓ " : "✗ ";
  const what = `match ${rank + 1}${right === null ? "" : right ? ", right" : ", wrong"}`;
  item.append(picture(row, what), element("span", "caption cosine", mark + data.cosines[query][rank].toFixed(3)));
  if (data.labelled) item.append(element("span", "caption", labelOf(row) || "no class"));
  return item;
}

function verdict(query) {
  if (!data.embedded[query]) return "it could not be embedded";
  if (!data.labelled) return `ahead of the next by ${data.margin[query].toFixed(3)}`;
  if (isRight(query)) return "✓ right at once";
  return data.first[query] ? `✗ the first right one is number ${data.first[query]}` : "✗ no right one found";
}

function queryItem(query) {
  const item = element("li");
  const figure = element("figure", "query");
  const caption = element("figcaption");
  if (data.labelled) caption.append(element("strong", "caption", labelOf(query)));
  caption.append(element("span", "caption", data.names[query]), element("span", "verdict", verdict(query)));
  figure.append(picture(query, "query"), caption);
  const matches = element("ol", "matches");
  data.matches[query].forEach((_, rank) => matches.append(matchItem(query, rank)));
  item.append(figure, matches);
  return item;
}

const ORDERS = {
  worst: (a, b) => (data.first[b] || 1e9) - (data.first[a] || 1e9) || data.cosines[b][0] - data.cosines[a][0],
  uncertain: (a, b) => data.embedded[b] - data.embedded[a] || data.margin[a] - data.margin[b],
  random: (a, b) => data.random[a] - data.random[b],
  name: (a, b) => a - b,
};

function choose() {
  const [order, label, verdictWanted] = ["order", "class", "verdict"].map((id) => (at(id) ? at(id).value : "all"));
  const text = at("text").value.trim().toLowerCase();
  shown = queries.filter((query) =>
    (label === "all" || String(data.labels[query]) === label) &&
    (verdictWanted === "all" || isRight(query) === (verdictWanted === "right")) &&
    data.names[query].toLowerCase().includes(text));
  shown.sort(ORDERS[order]);
  page = 0;
  draw();
}

function draw() {
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  const part = shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
  at("queries").replaceChildren(...part.map(queryItem));
  if (!part.length) at("queries").append(element("li", "none", "no query is like this"));
  const from = page * PER_PAGE;
  at("where").textContent = part.length ? `${from + 1} to ${from + part.length} of ${shown.length}` : "0 of 0";
  at("before").disabled = page === 0;
  at("after").disabled = page === pages - 1;
}

function turn(by) {
  const pages = Math.ceil(shown.length / PER_PAGE);
  if (page + by < 0 || page + by >= pages) return;
  page += by;
  draw();
}

["order", "class", "verdict"].forEach((id) => at(id) && at(id).addEventListener("change", choose));
at("text").addEventListener("input", choose);
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("before").addEventListener("click", () => turn(-1));
at("after").addEventListener("click", () => turn(1));
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "ArrowLeft") turn(-1);
  if (event.key === "ArrowRight") turn(1);
});

// ---- the map: the marks in the group tsne-points-N show the images data.points[N], in the same order

function rowOf(mark) {
  const group = mark.closest("g[id^='tsne-points-']");
  if (!group || mark.localName !== "use") return undefined;
  const marks = (group.marks ||= [...group.querySelectorAll("use")]);
  return data.points[Number(group.id.slice("tsne-points-".length))][marks.indexOf(mark)];
}

function showHint(event) {
  const row = rowOf(event.target);
  const hint = at("hint");
  hint.style.display = row === undefined ? "none" : "block";
  if (row === undefined) return;
  const side = row < queries.length ? "query" : "gallery";
  hint.replaceChildren(picture(row, side), element("span", "caption", data.names[row]),
    element("span", "caption note", data.labelled ? `${side}, ${labelOf(row) || "no class"}` : side));
  hint.style.left = `${Math.min(event.clientX + 14, innerWidth - hint.offsetWidth - 8)}px`;
  hint.style.top = `${Math.min(event.clientY + 14, innerHeight - hint.offsetHeight - 8)}px`;
}

function showQuery(event) {
  const row = rowOf(event.target);
  if (row === undefined || row >= queries.length) return;
  at("filters").reset();
  at("text").value = data.names[row];
  choose();
  at("matches").scrollIntoView();
}

if (at("tsne")) {
  at("tsne").addEventListener("pointermove", showHint);
  at("tsne").addEventListener("pointerleave", () => (at("hint").style.display = "none"));
  at("tsne").addEventListener("click", showQuery);
}
choose();
