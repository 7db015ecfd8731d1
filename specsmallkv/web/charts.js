// What every page draws with: elements, a tip that follows pointer and finger, axes, columns, lines.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const node = ["svg", "g", "rect", "line", "path", "circle", "text", "polyline", "title"].includes(tag)
    ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null && child !== undefined).map((c) => c instanceof Node ? c : String(c)));
  return node;
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const sum = (list) => list.reduce((a, b) => a + b, 0);
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const percent = (x, digits = 0) => x === null || x === undefined ? "–" : `${(100 * x).toFixed(digits)}%`;
const whole = (x) => Math.round(x).toLocaleString("en-US");
function short(x) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  if (size >= 1000) return whole(x);
  if (size !== 0 && size < 0.001) return x.toExponential(1);
  return String(+x.toPrecision(3));
}
function bytes(x) {
  if (x === null || x === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (x >= 1024 && at < units.length - 1) { x /= 1024; at += 1; }
  return `${at && x < 100 ? x.toFixed(x < 10 ? 2 : 1) : Math.round(x)} ${units[at]}`;
}
function visible(text) {  // a token that could not be seen otherwise
  return text === "" ? "(part of a character)" : text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, (s) => "␣".repeat(s.length));
}

// --- tip -----------------------------------------------------------------------------------------------------------

const tip = {
  show(event, head, rows = [], foot = null) {
    const box = $("tip");
    box.replaceChildren(make("b", {}, head), ...rows.map(([a, b, dim]) => make("div", { class: dim ? "muted" : "" }, make("span", {}, a), make("span", {}, b))));
    if (foot) box.append(make("div", { class: "muted" }, make("span", {}, foot)));
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const below = event.clientY + 18 + height < innerHeight;
    box.style.left = `${clamp(event.clientX - width / 2, 8, innerWidth - width - 8)}px`;
    box.style.top = `${Math.max(8, below ? event.clientY + 18 : event.clientY - height - 14)}px`;
  },
  hide() { $("tip").hidden = true; },
};
function tips(node, content) {  // content: event -> arguments of tip.show, or null
  const show = (event) => { const what = content(event); if (what) tip.show(event, ...what); else tip.hide(); };
  node.addEventListener("pointermove", show);
  node.addEventListener("pointerdown", show);
  node.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") tip.hide(); });
}
document.addEventListener("pointerdown", (event) => { if (!event.target.closest("[data-tips]")) tip.hide(); });
addEventListener("scroll", () => tip.hide(), { passive: true });

// --- axes ----------------------------------------------------------------------------------------------------------

function ticks(low, high, count = 5) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + step * 1e-6; x += step) found.push(+x.toPrecision(12));
  return found;
}
function logTicks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) for (const m of [1, 2, 5]) {
    const x = +(m * 10 ** e).toPrecision(12);
    if (x >= low * 0.999 && x <= high * 1.001) found.push(x);
  }
  return found.length > 7 ? found.filter((x) => String(x.toExponential()).startsWith("1e")) : found;
}
function legend(list, items) {
  list.replaceChildren(...items.map(([name, fill, value]) =>
    make("li", {}, make("i", { style: `background:${fill}` }), name, value === undefined ? null : make("b", {}, value))));
}
const redraws = [];
function drawn(draw) { redraws.push(draw); draw(); }
const pageWidth = () => document.documentElement.clientWidth;
let lastWidth = pageWidth();
addEventListener("resize", () => {
  if (pageWidth() <= 100 || pageWidth() === lastWidth) return;  // nothing can be drawn in a window that is folded away
  lastWidth = pageWidth();
  redraws.forEach((draw) => draw());
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((draw) => draw()));

// --- columns: one per x, stacked -------------------------------------------------------------------------------------

// series: [{name, fill, values, faint}]; options: title, unit, height, first (x of the first column), about(i) -> tip
function columns(box, series, options) {
  const width = box.clientWidth || 600, height = options.height || 150, left = 44, top = 24, bottom = options.last ? 34 : 16;
  const count = series[0].values.length, inner = width - left - 4, step = inner / count, plot = height - top - bottom;
  const totals = series[0].values.map((_, i) => sum(series.map((s) => s.values[i] || 0)));
  const high = Math.max(...totals, 1e-9), marks = ticks(0, high, 3), y = (v) => top + plot * (1 - v / Math.max(high, marks.at(-1)));
  const svg = make("svg", { width, height, role: "img", "aria-label": options.title, "data-tips": "" });
  for (const v of marks) svg.append(make("line", { class: v ? "axis" : "base", x1: left, x2: width, y1: y(v), y2: y(v) }), make("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, short(v)));
  svg.append(make("text", { class: "title", x: 0, y: 13 }, options.title));
  const bar = Math.max(1, Math.min(step - (step > 5 ? 2 : step > 2.5 ? 0.8 : 0), 26));
  for (let i = 0; i < count; i += 1) {
    let base = 0;
    const x = left + step * i + (step - bar) / 2;
    for (const s of series) {
      const v = s.values[i] || 0;
      if (v > 0) svg.append(make("rect", { x, width: bar, y: y(base + v), height: Math.max(0, y(base) - y(base + v)), fill: s.fill, "fill-opacity": s.faint ? 0.28 : null }));
      base += v;
    }
  }
  if (options.last) {
    for (const t of ticks(options.first, options.first + count - 1, width < 500 ? 4 : 10)) if (Number.isInteger(t)) svg.append(make("text", { x: left + step * (t - options.first + 0.5), y: height - bottom + 15, "text-anchor": "middle" }, t));
    svg.append(make("text", { x: width, y: height - 2, "text-anchor": "end" }, options.last));
  }
  for (let i = 0; i < count; i += 1) {
    const hit = make("rect", { class: "hit", x: left + step * i, width: step, y: top, height: plot });
    tips(hit, () => options.about(i));
    svg.append(hit);
  }
  box.replaceChildren(svg);
}

// --- lines: one per series over numbers --------------------------------------------------------------------------------

// series: [{name, fill, dash, shape, points: [{x, y, low, high, about}], across: a single point is a level}]; options: title, x, y (names of the axes), logX, logY, share
function lines(box, series, options) {
  const width = box.clientWidth || 520, height = 280, left = 54, right = 10, top = 10, bottom = 44;
  const points = series.flatMap((s) => s.points), xs = points.map((p) => p.x), ys = points.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y]);
  const log = { x: options.logX && Math.min(...xs) > 0, y: options.logY && Math.min(...ys) > 0 };
  const spread = (list, logged, zero) => {
    let [low, high] = [Math.min(...list), Math.max(...list)];
    if (logged) return low === high ? [low / 2, high * 2] : [low * (low / high) ** 0.05, high * (high / low) ** 0.05];
    if (zero) return [0, high > 0 ? high * 1.06 : 1];
    if (low === high) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
    return [low - (high - low) * 0.05, high + (high - low) * 0.05];
  };
  const rangeX = spread(xs, log.x, false), rangeY = options.share ? [0, 1] : spread(ys, log.y, true);
  const scale = ([low, high], logged, from, to) => (v) => from + (to - from) * (logged ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low));
  const x = scale(rangeX, log.x, left, width - right), y = scale(rangeY, log.y, height - bottom, top);
  const svg = make("svg", { width, height, role: "img", "aria-label": options.title, "data-tips": "" });
  for (const v of log.y ? logTicks(...rangeY) : ticks(...rangeY, 5)) svg.append(make("line", { class: "axis", x1: left, x2: width - right, y1: y(v), y2: y(v) }), make("text", { x: left - 7, y: y(v) + 4, "text-anchor": "end" }, short(v)));
  const given = [...new Set(xs)].sort((a, b) => a - b);
  for (const v of given.length <= 7 ? given : log.x ? logTicks(...rangeX) : ticks(...rangeX, 6)) svg.append(make("line", { class: "axis", x1: x(v), x2: x(v), y1: height - bottom, y2: height - bottom + 4 }), make("text", { x: x(v), y: height - bottom + 18, "text-anchor": "middle" }, short(v)));
  svg.append(make("line", { class: "base", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, options.x));
  for (const s of series) {
    const sorted = [...s.points].sort((a, b) => a.x - b.x), group = make("g", { "data-series": s.name });
    svg.append(group);
    group.append(make("polyline", { points: s.across && sorted.length === 1 ? `${left},${y(sorted[0].y)} ${width - right},${y(sorted[0].y)}` : sorted.map((p) => `${x(p.x)},${y(p.y)}`).join(" "), fill: "none", stroke: s.fill, "stroke-width": 2, "stroke-dasharray": s.dash || null, "stroke-linejoin": "round" }));
    for (const p of sorted) {
      if (p.low !== undefined) group.append(make("line", { x1: x(p.x), x2: x(p.x), y1: y(p.low), y2: y(p.high), stroke: s.fill, "stroke-width": 1.2 }));
      group.append(marker(s.shape, x(p.x), y(p.y), s.fill));
      const hit = make("circle", { cx: x(p.x), cy: y(p.y), r: 13, class: "hit" });
      tips(hit, () => p.about);
      group.append(hit);
    }
  }
  box.replaceChildren(make("h3", {}, options.title), svg);  // as text it breaks on a phone, in the picture it would be cut off
}
const SHAPES = ["circle", "square", "triangle", "diamond"];
function marker(shape, x, y, fill) {
  const paths = { square: "M-4,-4h8v8h-8z", triangle: "M0,-5L5,4H-5z", diamond: "M0,-5.5L5.5,0L0,5.5L-5.5,0z" };
  if (paths[shape]) return make("path", { d: paths[shape], transform: `translate(${x},${y})`, fill });
  return make("circle", { cx: x, cy: y, r: 4.2, fill });
}

// --- small things --------------------------------------------------------------------------------------------------

function tiles(box, items) {
  box.replaceChildren(...items.filter(Boolean).map(([value, label]) => make("div", { class: "tile" }, make("b", {}, value), make("span", {}, label))));
}
function table(box, head, rows, numbers = new Set(), wide = new Set()) {
  const kind = (i) => numbers.has(i) ? "number" : wide.has(i) ? "wide" : "";
  const body = rows.map((row) => make("tr", {}, ...row.map((cell, i) => make("td", { class: kind(i) }, cell === null || cell === undefined ? "–" : cell))));
  box.replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head.map((name, i) => make("th", { class: kind(i), scope: "col" }, name)))), make("tbody", {}, ...body)));
}
async function inflate(text) {
  const stream = new Blob([unpack(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
function unpack(text) {
  const packed = atob(text), found = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i += 1) found[i] = packed.charCodeAt(i);
  return found;
}
const bit = (bytes_, at) => (bytes_[at >> 3] >> (7 - (at & 7))) & 1;
