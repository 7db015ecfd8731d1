// The page of a set of records.
const FILLS = ["blue", "orange", "green", "pink", "amber", "sky", "grey"];
const LOOKS = { full: { fill: "var(--text)", dash: "2 4", across: true }, oracle: { fill: "var(--grey)", dash: "6 4" } };
const looks = new Map();
function look(name) {  // the same line looks the same in every picture
  if (!looks.has(name)) {
    const n = looks.size - [...looks.keys()].filter((known) => LOOKS[known]).length;
    looks.set(name, { fill: `var(--${FILLS[n % FILLS.length]})`, dash: n < FILLS.length ? null : "5 3", shape: SHAPES[n % SHAPES.length], ...LOOKS[name] });
  }
  return looks.get(name);
}
const own = DATA.figures.flatMap((f) => f.kind === "lines" ? f.series.map((s) => s.name) : f.bars.map((b) => b.name));
[...own.filter((name) => name === "specsmallkv"), ...own].forEach(look);

function about(figure, name, p) {
  const value = figure.share ? percent(p.y, 1) : short(p.y), lines_ = [[figure.title, value]];
  if (p.low !== undefined) lines_.push([p.count > 1 ? "range" : "interval", figure.share ? `${percent(p.low, 1)} to ${percent(p.high, 1)}` : `${short(p.low)} to ${short(p.high)}`, true]);
  return [name, [...lines_, ["kv_budget", short(p.x), true]], p.count > 1 ? `mean of ${p.count} rows` : p.record];
}
function picture(figure) {
  const holder = make("div"), box = make("div", { class: "chart" }), list = make("ul", { class: "legend" });
  holder.append(box, list);
  const title = DATA.tables.length > 1 ? `${figure.title} (${figure.task})` : figure.title;
  if (figure.kind === "lines") {
    const series = figure.series.map((s) => ({ ...s, ...look(s.name), points: s.points.map((p) => ({ ...p, about: about(figure, s.name, p) })) }));
    list.replaceChildren(...series.map((s) => picking(box, make("li", { tabindex: 0 }, sample(s), s.name), s.name)));
    if (series.length > 8) list.classList.add("long");
    return [holder, () => lines(box, series, { title, x: "kv_budget: share of the full cache's bytes", logX: true, logY: figure.log, share: figure.share })];
  }
  return [holder, () => bars(box, figure, title)];
}
function picking(box, entry, name) {  // pointed at, tapped or in focus, it leaves its line alone in the picture
  const pick = (only) => { for (const group of box.querySelectorAll("g")) group.classList.toggle("dim", only && group.dataset.series !== name); };
  for (const kind of ["pointerenter", "focus"]) entry.addEventListener(kind, () => pick(true));
  for (const kind of ["pointerleave", "blur"]) entry.addEventListener(kind, () => pick(false));
  return entry;
}
function sample(s) {  // of a line and its marker
  const svg = make("svg", { width: 30, height: 12 });
  svg.append(make("line", { x1: 0, x2: 30, y1: 6, y2: 6, stroke: s.fill, "stroke-width": 2, "stroke-dasharray": s.dash || null }), marker(s.shape, 15, 6, s.fill));
  return svg;
}
function bars(box, figure, title) {
  const most = figure.share ? 1 : Math.max(...figure.bars.map((b) => b.high ?? b.y), 1e-12), several = new Set(figure.bars.map((b) => b.budget)).size > 1;
  const grid = make("div", { class: "ledger" });
  for (const b of figure.bars) {
    const bar = make("div", { class: "bar", "data-tips": "" }, make("i", { style: `width:${100 * b.y / most}%;background:${look(b.name).fill}` }));
    tips(bar, () => about(figure, b.name, b));
    grid.append(make("div", { class: "entry" }, make("div", { class: "label" }, b.name, several ? make("small", {}, `kv_budget ${short(b.budget)}`) : null), bar, make("div", { class: "value" }, figure.share ? percent(b.y, 1) : short(b.y))));
  }
  box.replaceChildren(make("h3", {}, title), grid);
  if (figure.left_out) box.append(make("p", { class: "note" }, `${figure.left_out} more are in the table.`));
}

$("title").textContent = DATA.directory;
$("lead").textContent = DATA.tables.map((t) => `${t.task}: ${t.rows.length} ${t.rows.length === 1 ? "row" : "rows"}`).join("; ");
const failed = Object.entries(DATA.failed);
tiles($("tiles"), [[DATA.records, DATA.records === 1 ? "record" : "records"], [DATA.rows, DATA.rows === 1 ? "row" : "rows"], failed.length ? [failed.length, "failed"] : null, DATA.interrupted.length ? [DATA.interrupted.length, "interrupted"] : null, [DATA.surroundings.length, DATA.surroundings.length === 1 ? "set of versions, commit and machine" : "sets of versions, commit and machine"]]);
if (failed.length) table($("failed"), ["record", "error"], failed, new Set(), new Set([1])); else $("failed-section").remove();
const pictures = DATA.figures.map(picture);
if (!pictures.length) $("figures-section").remove();
else {
  $("figures").className = "pair";
  pictures.forEach(([holder, draw]) => { $("figures").append(holder); });
  pictures.forEach(([, draw]) => drawn(draw));
}
for (const t of DATA.tables) {
  const box = make("div", { class: "table" });
  table(box, t.head, t.rows, new Set(t.numbers));
  $("tables").append(make("h3", {}, t.task), box);
}
const commits = new Set(DATA.surroundings.map((s) => s.git_hash)), machines = new Set(DATA.surroundings.map((s) => s.device_name));
$("warning").textContent = [commits.size > 1 ? "The records are of several commits." : "", machines.size > 1 ? "They are of several machines: do not compare their speeds." : ""].join(" ");
const packages = [...new Set(DATA.surroundings.flatMap((s) => Object.keys(s.versions || {})))];
table($("surroundings"), ["records", "commit", "machine", ...packages], DATA.surroundings.map((s) => [s.records, (s.git_hash || "–").replace(/^(.{12}).{28}/, "$1"), s.device_name, ...packages.map((p) => (s.versions || {})[p])]), new Set([0]));
const paths = Object.keys(DATA.differing), keys = paths.length ? Object.keys(DATA.differing[paths[0]]) : [];
const value = (x) => x === null || x === undefined ? "–" : typeof x === "object" ? JSON.stringify(x) : String(x);
if (keys.length) table($("differing"), ["record", ...keys], paths.map((path) => [path, ...keys.map((key) => value(DATA.differing[path][key]))]));
else $("differing").append(make("p", { class: "note" }, "None."));
table($("commands"), ["record", "overrides"], Object.entries(DATA.commands).map(([path, list]) => [path, (list || []).join(" ") || "–"]), new Set(), new Set([1]));
table($("common"), ["setting", "value"], Object.entries(DATA.common).map(([key, v]) => [key, value(v)]), new Set(), new Set([1]));
document.documentElement.dataset.ready = "true";
