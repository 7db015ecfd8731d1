// The page of one run.
const { record, rounds, prompt, text, vocabulary } = DATA;
const everyToken = [...prompt, ...text];
const say = (id) => visible(vocabulary[id] ?? `#${id}`);

// --- head ----------------------------------------------------------------------------------------------------------

function head() {
  const drafts = record.num_draft_tokens ? `${record.num_draft_tokens} draft tokens a round` : "no speculation";
  $("title").textContent = `${record.model}, ${record.policy}`;
  $("lead").textContent = `kv_budget ${record.kv_budget}, ${drafts}; ${whole(record.prompt_tokens)} prompt tokens, ${whole(record.new_tokens)} new, in ${record.dtype} on ${record.device_name || record.device}` + (record.interrupted ? "; interrupted" : "");
  tiles($("tiles"), [
    [short(record.decode_tokens_per_second), "tokens per second, decoding"],
    [`${record.ttft_seconds.toFixed(2)} s`, "to the first token"],
    record.acceptance_rate === null ? null : [percent(record.acceptance_rate), `of ${record.drafted_tokens} drafts accepted`],
    record.acceptance_length === null ? null : [record.acceptance_length.toFixed(2), "tokens per verify pass"],
    record.target_kv_bytes === null ? null : [percent(record.kv_budget_effective, 1), `of the full cache on the device: ${bytes(record.target_kv_bytes)}`],
    record.recall_bytes === null ? null : [bytes(record.recall_bytes), record.new_per_round === null ? "recalled" : `recalled; ${percent(record.new_per_round)} of the kept set new each time`],
  ]);
}

// --- the text --------------------------------------------------------------------------------------------------------

const ORIGINS = {
  accepted: "accepted draft", corrected: "correction by the target", bonus: "bonus after a full block", first: "first token, from the prompt", plain: "decoded without drafts",
};
function origin(row, i) {
  if (row.round === 0) return "first";
  if (i < row.accepted) return "accepted";
  if (!row.drafts.length) return "plain";
  return row.accepted < row.drafts.length ? "corrected" : "bonus";
}
function textSection() {
  const box = $("text"), counts = {};
  let at = 0, refusedCount = 0;
  rounds.forEach((row) => {
    row.tokens.forEach((token, i) => {
      const kind = origin(row, i), mine = at;
      counts[kind] = (counts[kind] || 0) + 1;
      if (kind === "corrected") { box.append(make("del", {}, row.drafts.slice(row.accepted).map(say).join(""))); refusedCount += row.drafts.length - row.accepted; }
      const span = make("span", { class: `${kind}${i === 0 ? " edge" : ""}`, "data-tips": "" });
      text[mine].split(/(\n)/).filter((part) => part).forEach((part) => part === "\n" ? span.append(make("span", { class: "mark" }, "↵"), "\n") : span.append(part));
      tips(span, () => aboutToken(row, i, mine, kind));
      box.append(span);
      at += 1;
    });
  });
  legend($("origins"), Object.entries(ORIGINS).filter(([kind]) => counts[kind]).map(([kind, name]) => [name, getComputedStyle(box.querySelector(`.${kind}`)).getPropertyValue("--c"), counts[kind]]));
  $("refused").addEventListener("change", (event) => box.classList.toggle("with-refused", event.target.checked));
  if (!refusedCount) $("refused").closest(".controls").remove();
}
function aboutToken(row, i, at, kind) {
  const lines = [["target's probability", percent(row.probabilities[i], 1)]];
  if (kind === "accepted" && row.draft_probabilities) lines.push(["draft's probability", percent(row.draft_probabilities[i], 1)]);
  if (kind === "corrected") {
    lines.push([`the draft said “${say(row.drafts[i])}”`, row.draft_probabilities ? percent(row.draft_probabilities[i], 1) : ""]);
    lines.push(["the target gives that", percent(row.target_probabilities[i], 1)]);
  }
  const others = (DATA.alternatives[at] || []).filter(([token]) => token !== row.tokens[i]).slice(0, 3);
  lines.push(...others.map(([token, p], n) => [`${n ? "" : "others: "}“${say(token)}”`, percent(p, 1), true]));
  return [`“${visible(text[at])}”`, lines, `${ORIGINS[kind]} · round ${row.round} · position ${row.position + i}`];
}

// --- rounds ----------------------------------------------------------------------------------------------------------

const PHASES = [["draft", "draft", "sky"], ["plan", "plan and recall", "amber"], ["verify", "verify", "blue"], ["evict", "roll back and evict", "grey"]];
function roundsSection() {
  const shown = rounds.slice(1);
  if (!shown.length) { $("rounds").closest("section").remove(); return; }
  const prefill = shown[0].ms.prefill_draft;
  const outside = prefill ? ` The draft's reading of the prompt, ${short(prefill / 1000)} s before round 1, is left out.` : "";
  $("rounds-note").textContent = `${shown.length} verify passes; each is one pass of the target over the last token and the drafts.${outside}`;
  const about = (i) => {
    const row = shown[i];
    return [`round ${row.round}`, [
      ["text", `“${row.text.length > 40 ? row.text.slice(0, 40) + "…" : row.text}”`],
      ...(row.drafts.length ? [["drafts accepted", `${row.accepted} of ${row.drafts.length}`]] : []),
      ...PHASES.map(([key, name]) => [name, `${short(row.ms[key] || 0)} ms`, true]),
      ["recalled", bytes(row.recall_bytes), true],
    ]];
  };
  const own = (row) => Math.max(0, row.tokens.length - row.accepted);
  const passed = (row) => row.drafts.length > 0 && row.accepted === row.drafts.length;
  const slow = Math.max(...shown.map((row) => sum(PHASES.map(([key]) => row.ms[key] || 0)))) > 2000;
  const charts = [
    { title: "Tokens per verify pass", series: [
      { name: "accepted drafts", fill: "var(--blue)", values: shown.map((row) => row.accepted) },
      { name: "bonus", fill: "var(--green)", values: shown.map((row) => passed(row) ? own(row) : 0) },
      { name: "correction", fill: "var(--orange)", values: shown.map((row) => row.drafts.length && !passed(row) ? own(row) : 0) },
      { name: "without drafts", fill: "var(--grey)", values: shown.map((row) => row.drafts.length ? 0 : own(row)) },
      { name: "refused drafts", fill: "var(--grey)", faint: true, values: shown.map((row) => row.drafts.length - row.accepted) },
    ] },
    { title: slow ? "Seconds per round" : "Milliseconds per round", series: PHASES.map(([key, name, fill]) => ({ name, fill: `var(--${fill})`, values: shown.map((row) => (row.ms[key] || 0) / (slow ? 1000 : 1)) })) },
  ];
  if (record.recall_bytes) charts.push({ title: "Recalled from host memory, MiB per round", height: 110, series: [{ name: "recalled", fill: "var(--recalled)", values: shown.map((row) => row.recall_bytes / 2 ** 20) }] });
  charts.forEach(({ title, series, height }, n) => {
    const used = series.filter((s) => sum(s.values) > 0), list = make("ul", { class: "legend" }), box = make("div", { class: "chart" });
    if (!used.length) return;
    if (used.length > 1) legend(list, used.map((s) => [s.name, s.faint ? "color-mix(in srgb, var(--grey) 28%, transparent)" : s.fill]));
    $("rounds").append(box, used.length > 1 ? list : "");
    drawn(() => columns(box, used, { title, height: (height || 150) + (n === charts.length - 1 ? 18 : 0), first: 1, about, last: n === charts.length - 1 ? "round" : null }));
  });
}

// --- the map of tiers ------------------------------------------------------------------------------------------------

const TIER = { none: 0, critical: 1, recalled: 2, marginal: 3, evicted: 4, recent: 5 };
const TIER_CLASS = ["", "k", "n", "m", "e", "r"];
async function mapSection() {
  const map = DATA.map;
  if (!map) { $("map-section").replaceChildren(make("h2", {}, "What the cache holds"), make("p", { class: "note" }, "Everything: nothing was evicted in this run.")); return; }
  if (typeof DecompressionStream === "undefined") { $("map-readout").textContent = "This browser cannot unpack the map; a newer one can."; return; }
  const count = map.tail.length, size = map.stride * count, planes = {};
  for (const name of ["kept", "marginal"]) if (map[name]) planes[name] = restore(await inflate(map[name]), map.heads.length, count, map.stride);
  const state = { pair: 0, round: count - 1, at: null, zoom: 0, offset: 0 };
  const has = (name, round, at) => planes[name] && bit(planes[name], 8 * (state.pair * size + round * map.stride) + at);
  function tier(round, at) {
    if (at >= map.seen[round]) return TIER.none;
    if (at >= map.tail[round]) return map.tail[round] ? TIER.recent : TIER.critical;
    if (has("kept", round, at)) return round && at < map.tail[round - 1] && !has("kept", round - 1, at) ? TIER.recalled : TIER.critical;
    return has("marginal", round, at) ? TIER.marginal : TIER.evicted;
  }
  const host = record.target_kv_host_bytes > 0, gone = host ? "evicted: in host memory only" : "evicted: gone for good";
  const names = ["", "critical", "recalled in this round", "marginal: its value only", gone, "recent window and waiting tokens"];
  const fills = ["back", "critical", "recalled", "marginal", "evicted", "recent"];
  const box = $("map"), canvas = make("canvas", { "data-tips": "" }), spacer = make("div");
  spacer.append(canvas); box.append(spacer);
  const positions = Math.max(...map.seen), left = 40, top = 22;
  const rowHeight = clamp(Math.floor(430 / count), 2, 14), height = top + rowHeight * count + 4;
  const geometry = () => { const view = box.clientWidth, px = state.zoom || (view - left) / positions; return { view, px, offset: state.zoom ? state.offset : 0 }; };
  function draw() {
    const { view, px, offset } = geometry(), ratio = devicePixelRatio || 1, wide = Math.round((view - left) * ratio);
    spacer.style.width = `${state.zoom ? left + positions * px : view}px`;
    canvas.width = Math.round(view * ratio); canvas.height = Math.round(height * ratio);
    canvas.style.width = `${view}px`; canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d"), image = pen.createImageData(wide, count), palette = fills.map(rgb);
    for (let r = 0; r < count; r += 1) {
      const codes = new Uint8Array(positions);
      for (let j = 0; j < positions; j += 1) codes[j] = tier(r, j);
      for (let c = 0; c < wide; c += 1) {
        const from = Math.floor((c / ratio + offset) / px), to = Math.max(from + 1, Math.floor(((c + 1) / ratio + offset) / px));
        const mean = [0, 0, 0];
        let n = 0;
        for (let j = from; j < Math.min(to, positions); j += 1) { const p = palette[codes[j]]; mean[0] += p[0]; mean[1] += p[1]; mean[2] += p[2]; n += 1; }
        const spot = 4 * (r * wide + c);
        for (let k = 0; k < 3; k += 1) image.data[spot + k] = n ? mean[k] / n : palette[0][k];
        image.data[spot + 3] = 255;
      }
    }
    const small = new OffscreenCanvas(wide, count);
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, left * ratio, top * ratio, wide, rowHeight * count * ratio);
    pen.scale(ratio, ratio);
    pen.font = "12px system-ui, sans-serif"; pen.fillStyle = color("muted");
    pen.textAlign = "center";
    for (const t of ticks(offset / px, (offset + view - left) / px, view < 500 ? 3 : 8)) { const x = left + t * px - offset; if (x > left + 8 && x < view - 16) pen.fillText(whole(t), x, 14); }
    pen.textAlign = "left"; pen.fillText("position", 0, 14); pen.textAlign = "right";
    for (const t of ticks(0, count - 1, Math.max(2, Math.min(8, height / 50)))) if (Number.isInteger(t)) pen.fillText(rounds[t * map.step].round, left - 8, top + rowHeight * t + rowHeight / 2 + 4);
    pen.strokeStyle = color("text"); pen.lineWidth = 1;
    pen.strokeRect(left + 0.5, top + rowHeight * state.round - 0.5, view - left - 1, rowHeight + 1);
    if (state.at !== null) { pen.beginPath(); const x = Math.round(left + (state.at + 0.5) * px - offset) + 0.5; if (x > left) { pen.moveTo(x, top); pen.lineTo(x, top + rowHeight * count); pen.globalAlpha = 0.5; pen.stroke(); } }
  }
  function place(event) {
    const { px, offset } = geometry(), area = canvas.getBoundingClientRect(), x = event.clientX - area.left - left, y = event.clientY - area.top - top;
    const round = Math.floor(y / rowHeight), at = Math.floor((x + offset) / px);
    return x >= 0 && round >= 0 && round < count && at < map.seen[round] ? { round, at } : null;
  }
  function describe(round, at) {
    const around = [everyToken.slice(Math.max(0, at - 8), at).join(""), everyToken[at], everyToken.slice(at + 1, at + 9).join("")];
    return { name: names[tier(round, at)], row: rounds[round * map.step], around: around.map((s) => (s || "").replace(/\s+/g, " ")) };
  }
  tips(canvas, (event) => {
    const spot = place(event);
    if (!spot) return null;
    const { name, row, around } = describe(spot.round, spot.at);
    return [name, [[`…${around[0]}⟦${around[1]}⟧${around[2]}…`, ""]], `position ${spot.at} · round ${row.round}, which gave “${row.text.slice(0, 30)}”`];
  });
  canvas.addEventListener("click", (event) => { const spot = place(event); if (spot) { Object.assign(state, spot); draw(); lens(true); } });
  function lens(jump) {
    const spans = $("lens").children, row = rounds[state.round * map.step];
    for (let j = 0; j < spans.length; j += 1) spans[j].className = TIER_CLASS[tier(state.round, j)] + (j === state.at ? " at" : "");
    for (let j = 0; j < spans.length; j += 1) spans[j].hidden = j >= map.seen[state.round];
    const counts = [0, 0, 0, 0, 0, 0];
    for (let j = 0; j < map.seen[state.round]; j += 1) counts[tier(state.round, j)] += 1;
    const held = counts[1] + counts[2] + counts[5];
    $("map-readout").replaceChildren("The text below as ", make("b", {}, `layer ${map.heads[state.pair][0]}, KV head ${map.heads[state.pair][1]}`), " holds it in ", make("b", {}, `round ${row.round}`),
      `: ${whole(held)} of ${whole(map.seen[state.round])} tokens with K and V`, counts[2] ? `, ${whole(counts[2])} of them recalled in this round` : "", counts[3] ? `, ${whole(counts[3])} with V only` : "", ".");
    if (jump && state.at !== null && spans[state.at]) $("lens").scrollTop = spans[state.at].offsetTop - $("lens").offsetTop - $("lens").clientHeight / 2;
  }
  $("lens").append(...everyToken.slice(0, positions).map((word) => make("span", {}, word)));
  const layers = [...new Set(map.heads.map(([layer]) => layer))];
  $("layer").append(...layers.map((layer) => make("option", {}, layer)));
  const update = () => { state.pair = map.heads.findIndex(([l, h]) => l === +$("layer").value && h === +$("head").value); draw(); lens(false); };
  const fillHeads = () => { const before = $("head").value; $("head").replaceChildren(...map.heads.filter(([l]) => l === +$("layer").value).map(([, h]) => make("option", {}, h))); if ([...$("head").options].some((o) => o.value === before)) $("head").value = before; };
  $("layer").value = layers[Math.floor(layers.length / 2)];
  fillHeads();
  $("layer").addEventListener("change", () => { fillHeads(); update(); });
  $("head").addEventListener("change", update);
  [["whole", 0], ["1 px a token", 1], ["4 px a token", 4]].filter(([, px]) => !px || px * positions > box.clientWidth).forEach(([name, px]) => {
    const button = make("button", { "aria-pressed": px === 0, type: "button" }, name);
    button.addEventListener("click", () => { for (const other of $("zoom").children) other.setAttribute("aria-pressed", other === button); state.zoom = px; state.offset = 0; draw(); box.scrollLeft = state.at === null || !px ? 0 : Math.max(0, state.at * px - box.clientWidth / 2); });
    $("zoom").append(button, " ");
  });
  box.addEventListener("scroll", () => { tip.hide(); if (state.zoom) { state.offset = box.scrollLeft; requestAnimationFrame(draw); } });
  const marginal = Boolean(planes.marginal);
  legend($("tiers"), [1, 2, 3, 5, 4].filter((t) => (t !== 3 || marginal) && (t !== 2 || host)).map((t) => [names[t], `var(--${fills[t]})`]));
  if (map.heads.length < map.all_heads || map.step > 1) $("tiers").append(make("li", {}, `shown: ${map.heads.length} of ${map.all_heads} heads` + (map.step > 1 ? `, every ${map.step}th round` : "")));
  state.pair = map.heads.findIndex(([l, h]) => l === +$("layer").value && h === +$("head").value);
  drawn(draw);
  lens(false);
}
function restore(bits, heads, count, stride) {  // every round but the first came as the difference to the one before
  for (let h = 0; h < heads; h += 1) for (let r = 1; r < count; r += 1) {
    const at = (h * count + r) * stride;
    for (let k = 0; k < stride; k += 1) bits[at + k] ^= bits[at - stride + k];
  }
  return bits;
}
function rgb(name) {
  const pen = new OffscreenCanvas(1, 1).getContext("2d");
  pen.fillStyle = color(name); pen.fillRect(0, 0, 1, 1);
  return pen.getImageData(0, 0, 1, 1).data;
}

// --- attention -------------------------------------------------------------------------------------------------------

function attentionSection() {
  const { attention } = DATA;
  if (!attention || !attention.samples.length) {
    const none = record.rounds ? `Nothing to compare: ${record.policy} did not ask the draft for its attention in the rounds that are looked at (1, 4, 16, ...).` : "Nothing to compare: there was no round.";
    $("attention-section").replaceChildren(make("h2", {}, "Draft attention against target attention"), make("p", { class: "note" }, none));
    return;
  }
  $("attention-note").textContent = `Before each verify pass the draft's attention rows, mixed by the head map, stand in for what the target will look at. Cosine of the two, the first ${attention.sinks} tokens left out: 1 is a perfect guess. Outlined heads were compared with the target's true attention in ${attention.samples.length} ${attention.samples.length === 1 ? "round" : "rounds"}.` + (attention.samples.every((s) => s.everything) ? "" : " Evicted keys are gone in this run: after the first round the target's attention is known for the tokens that it still holds, and the cosine is over those.");
  const similarity = attention.similarity, flat = similarity.flat(), mean = sum(flat) / flat.length;
  const chosen = new Map(attention.samples[0].rows.map((row, i) => [`${row.layer},${row.head}`, i]));
  legend($("scale"), [0, 0.25, 0.5, 0.75, 1].map((v) => [String(v), shade(v)]));
  $("scale").append(make("li", {}, "mean ", make("b", {}, mean.toFixed(2))));
  drawn(() => similarityGrid(similarity, chosen));
  $("sample").append(...attention.samples.map((s, i) => make("option", { value: i }, `round ${s.round}: after “${visible(everyToken[s.position] || "")}”`)));
  $("pick").append(...attention.samples[0].rows.map((row, i) => make("option", { value: i }, `layer ${row.layer}, head ${row.head}`)));
  legend($("profile-legend"), [["target's attention", "var(--blue)"], ["draft's prediction", "var(--orange)"], ["held on the device", "var(--text)"], ...attention.samples.some((s) => s.rows.some((row) => row.marginal)) ? [["its value only", "var(--marginal)"]] : []]);
  for (const id of ["sample", "pick"]) $(id).addEventListener("change", profile);
  $("sample").value = attention.samples.length - 1;
  $("pick").value = attention.samples[0].rows.length >> 1;  // neither the best nor the worst
  drawn(profile);
}
const shade = (v) => `color-mix(in oklab, var(--high) ${Math.round(100 * clamp(v, 0, 1))}%, var(--low))`;
function similarityGrid(similarity, chosen) {
  const box = $("similarity"), layers = similarity.length, heads = similarity[0].length, left = 44, top = 4;
  const cell = clamp((box.clientWidth - left) / layers, 3, 34), tall = clamp(cell, 6, 20), width = left + cell * layers + 8, height = top + tall * heads + 20;
  const svg = make("svg", { width, height, role: "img", "aria-label": "match quality per layer and head", "data-tips": "" });
  const gap = cell > 8 ? 1.5 : 0;
  similarity.forEach((row, layer) => row.forEach((value, head) => {
    const index = chosen.get(`${layer},${head}`);
    const rect = make("rect", { x: left + cell * layer, y: top + tall * head, width: cell - gap, height: tall - gap, fill: shade(value), stroke: index === undefined ? null : "var(--text)", "stroke-width": index === undefined ? null : 1.8, style: index === undefined ? null : "cursor:pointer" });
    tips(rect, () => [`layer ${layer}, head ${head}`, [["cosine on the observation window", value.toFixed(3)]], index === undefined ? null : "click to compare it below"]);
    if (index !== undefined) rect.addEventListener("click", () => { $("pick").value = index; profile(); });
    svg.append(rect);
  }));
  for (const t of ticks(0, layers - 1, cell < 14 ? 5 : 10)) if (Number.isInteger(t)) svg.append(make("text", { x: left + cell * (t + 0.5), y: top + tall * heads + 15, "text-anchor": "middle" }, t));
  for (const t of ticks(0, heads - 1, Math.min(heads, tall * heads / 34))) if (Number.isInteger(t)) svg.append(make("text", { x: left - 8, y: top + tall * (t + 0.5) + 4, "text-anchor": "end" }, t));
  box.replaceChildren(svg);
}
function profile() {
  const sample = DATA.attention.samples[+$("sample").value], row = sample.rows[+$("pick").value], box = $("profile");
  const target = unpack(row.target), predicted = unpack(row.predicted), kept = unpack(row.kept), marginal = row.marginal ? unpack(row.marginal) : null, count = target.length;
  const width = box.clientWidth, left = 44, half = 112, band = 12, top = 22, height = top + 2 * half + band + 30, ratio = devicePixelRatio || 1;
  const canvas = make("canvas", { width: Math.round(width * ratio), height: Math.round(height * ratio), style: `width:${width}px;height:${height}px`, "data-tips": "" });
  const pen = canvas.getContext("2d"), inner = width - left - 2, px = inner / count, high = Math.max(...target, ...predicted, 1);
  pen.scale(ratio, ratio);
  pen.font = "12px system-ui, sans-serif";
  const y = (v, down) => down ? top + half + band + half * v / high : top + half - half * v / high;
  pen.textAlign = "right";
  for (const p of [0.001, 0.01, 0.03, 0.1, 0.3, 1].filter((p) => 255 * Math.sqrt(p) <= high * 1.001).slice(-3)) for (const down of [false, true]) {
    const at = Math.round(y(255 * Math.sqrt(p), down)) + 0.5;
    pen.strokeStyle = color("grid"); pen.beginPath(); pen.moveTo(left, at); pen.lineTo(width, at); pen.stroke();
    pen.fillStyle = color("muted"); pen.fillText(p, left - 6, at + 4);
  }
  const bins = Math.min(count, Math.floor(inner)), wide = inner / bins;
  for (let c = 0; c < bins; c += 1) {
    const from = Math.floor(c * count / bins), to = Math.max(from + 1, Math.floor((c + 1) * count / bins));
    let a = 0, b = 0, k = 0, m = 0;
    for (let j = from; j < to; j += 1) { a = Math.max(a, target[j]); b = Math.max(b, predicted[j]); k += bit(kept, j); m += marginal ? bit(marginal, j) : 0; }
    const x = left + c * wide, bar = Math.max(1, wide - (wide > 4 ? 1 : 0));
    pen.fillStyle = color("blue"); pen.fillRect(x, y(a, false), bar, half * a / high);
    pen.fillStyle = color("orange"); pen.fillRect(x, top + half + band, bar, half * b / high);
    for (const [n, fill] of [[m, "marginal"], [k, "text"]]) if (n) { pen.globalAlpha = 0.25 + 0.75 * n / (to - from); pen.fillStyle = color(fill); pen.fillRect(x, top + half + 3, bar, band - 6); pen.globalAlpha = 1; }
  }
  pen.fillStyle = color("muted"); pen.textAlign = "center";
  for (const t of ticks(0, count - 1, width < 500 ? 3 : 8)) { const x = left + (t + 0.5) * px; if (x > left + 10 && x < width - 60) pen.fillText(whole(t), x, height - 14); }
  pen.textAlign = "right"; pen.fillText("position", width, height - 14);
  pen.textAlign = "left"; pen.fillText("attention probability, square-root scale", 0, 12);
  tips(canvas, (event) => {
    const x = event.clientX - canvas.getBoundingClientRect().left - left;
    const near = Math.max(1, Math.ceil(3 / px)), middle = Math.floor(x / px);
    if (x < 0 || middle >= count) return null;
    let at = middle;
    for (let j = Math.max(0, middle - near); j <= Math.min(count - 1, middle + near); j += 1) if (target[j] + predicted[j] > target[at] + predicted[at]) at = j;
    const around = [everyToken.slice(Math.max(0, at - 6), at).join(""), everyToken[at], everyToken.slice(at + 1, at + 7).join("")].map((s) => (s || "").replace(/\s+/g, " "));
    return [`…${around[0]}⟦${around[1]}⟧${around[2]}…`, [["target", sample.everything || bit(kept, at) ? percent((target[at] / 255) ** 2, 2) : "unknown"], ["draft's prediction", percent((predicted[at] / 255) ** 2, 2)]], `position ${at} · ${bit(kept, at) ? "held" : marginal && bit(marginal, at) ? "its value only" : "evicted"}`];
  });
  box.replaceChildren(canvas);
  $("profile-readout").replaceChildren(make("b", {}, `Layer ${row.layer}, head ${row.head}`), `: cosine ${row.similarity.toFixed(2)} for this query. The device holds `, make("b", {}, percent(row.kept_share)), " of the tokens, and on them lies ", make("b", {}, percent(sample.everything ? row.kept_mass : row.predicted_mass, 1)), sample.everything ? " of the head's true attention." : " of the attention that the draft predicts.", marginal ? ` The draft predicts ${percent(row.predicted_marginal, 1)} on those of which the value alone is held.` : "");
}

// --- bytes -----------------------------------------------------------------------------------------------------------

function ledger() {
  const saved = (record.target_kv_bytes_full || 0) - (record.target_kv_bytes || 0), cost = (record.draft_weight_bytes || 0) + (record.draft_kv_bytes || 0) + (record.scratch_bytes || 0);
  const sentence = record.target_kv_bytes === null ? "" : `In its fullest round after the prefill the target's cache held ${bytes(record.target_kv_bytes)} of ${bytes(record.target_kv_bytes_full)}: ${bytes(saved)} saved, ${bytes(record.recall_bytes)} recalled in all. `;
  $("bytes-note").textContent = sentence + (cost ? `The draft costs ${bytes(cost)} in weights, cache and scratch. ` : "") + "The two groups have scales of their own.";
  const groups = [
    ["Weights", [["target", record.target_weight_bytes, "grey", record.target_weights], ["draft", record.draft_weight_bytes, "sky", record.draft_weights ? `${record.draft_weights}; what it shares with the target is not counted twice` : null]]],
    ["Caches and scratch", [
      ["target's KV, on the device", record.target_kv_bytes, "blue", "dashed: a full cache", record.target_kv_bytes_full],
      ["draft's KV", record.draft_kv_bytes, "sky", "never evicted"],
      ["scratch", record.scratch_bytes, "amber", "the draft's rows and their sums"],
      ["target's KV, in host memory", record.target_kv_host_bytes, "grey", "every token older than the tail"],
    ]],
  ];
  for (const [name, rows] of groups) {
    const used = rows.filter(([, value]) => value), most = Math.max(...used.map(([, value, , , full]) => Math.max(value, full || 0)));
    if (!used.length) continue;
    const grid = make("div", { class: "ledger" });
    for (const [label, value, fill, remark, full] of used) grid.append(make("div", { class: "entry" },
      make("div", { class: "label" }, label, remark ? make("small", {}, remark) : null),
      make("div", { class: "bar" }, full ? make("i", { class: "outline", style: `width:${100 * full / most}%` }) : null, make("i", { style: `width:${100 * value / most}%;background:var(--${fill})` })),
      make("div", { class: "value" }, bytes(value), full ? make("small", {}, `of ${bytes(full)}`) : null)));
    $("ledger").append(make("h3", {}, name), grid);
  }
  const total = sum([record.target_weight_bytes, record.draft_weight_bytes, record.target_kv_bytes, record.draft_kv_bytes, record.scratch_bytes].map((x) => x || 0));
  $("ledger").append(make("p", { class: "note", style: "margin-top:.9rem" }, `On the device in all: ${bytes(total)}. Peak of the process, loading included: ${bytes(record.peak_memory_bytes)}.`));
}

function facts() {
  const versions = Object.entries(record.versions || {}).filter(([, v]) => v).map(([k, v]) => `${k} ${v}`).join(", ");
  table($("facts"), ["", ""], [
    ["device", [record.device, record.device_name].filter(Boolean).join(", ")], ["attention", record.attention], ["seed", record.seed], ["versions", versions], ["commit", record.git_hash],
  ].filter(([, value]) => value !== null && value !== undefined), new Set(), new Set([1]));
  $("config").textContent = JSON.stringify(record.config, null, 2);
}

head();
textSection();
roundsSection();
attentionSection();
ledger();
facts();
mapSection().then(() => { document.documentElement.dataset.ready = "true"; });
