// The token explorer of report.html and of `knnext explore`. Text goes in through textContent only:
// a corpus may hold any markup.
"use strict";
const knnextExplorer = (() => {
  const { same, mean, perplexity } = knnextPassages;
  const byId = (id) => document.getElementById(id);
  const root = byId("explorer"), texts = byId("texts"), panel = byId("panel"), token = byId("token");
  const LIMITS = [0.1, 0.3, 0.8, 2]; // nats; the same on both sides
  const NARROW = matchMedia("(max-width: 56rem)");
  const SHOWN = 6; // neighbors before "more"

  // What is shown: leaves of passages (one, or two side by side), by which system, against which.
  const state = { leaves: [], systems: [], leaf: 0, side: 0, i: -1, system: 0, against: -1, more: false };
  let tuned = [], settings = [], blocks = [], pending = 0;

  const leaf = () => state.leaves[state.leaf];
  const passage = () => leaf().passages[state.side];
  const p = (at = state.system) => settings[at];

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // What cannot be seen gets a sign: line ends, tabs, control characters.
  const SIGNS = /[\n\t\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
  function sign(character) {
    if (character === "\n") return "⏎";
    if (character === "\t") return "⇥";
    const code = character.codePointAt(0);
    return code < 0x20 ? String.fromCodePoint(0x2400 + code) : `⟨${code.toString(16)}⟩`;
  }
  // For those who hear it: a sign such as ␣ would be read by its name.
  const NAMED = { "\n": " line end ", "\t": " tab " };
  const spoken = (string) => string.replace(/[\n\t]/g, (c) => NAMED[c]).replace(/ +/g, " ").trim() || (string ? "space" : "empty");
  const label = (string) => string.replace(SIGNS, sign).replace(/ /g, "␣") || "⟨empty⟩";

  function append(element, string) {
    let end = 0;
    for (const match of string.matchAll(SIGNS)) {
      element.append(string.slice(end, match.index));
      element.append(make("i", { class: "mark", "aria-hidden": "true" }, sign(match[0])));
      if (match[0] === "\n" || match[0] === "\t") element.append(match[0]);
      end = match.index + 1;
    }
    element.append(string.slice(end));
    return element;
  }

  const signed = (x) => (Math.abs(x) < 0.005 ? "±" : x < 0 ? "−" : "+") + (Number.isFinite(x) ? Math.abs(x).toFixed(2) : "∞");
  const percent = (x) => (x >= 0.0995 ? (100 * x).toFixed(0) : (100 * x).toFixed(x >= 0.01 ? 1 : 2)) + " %";
  const superscript = (n) => String(n).replace(/[-0-9]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  const factor = (x) => (x >= 100 ? Math.round(x).toLocaleString("en") : x.toPrecision(3));
  const figure = (x) => (!Number.isFinite(x) ? "∞" : x < 100 ? x.toPrecision(4) :
    x.toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 }));
  function chance(x) {
    if (!(x > 0)) return "0";
    if (x >= 0.001) return x.toFixed(3);
    const power = Math.floor(Math.log10(x));
    return `${(x / 10 ** power).toFixed(1)}·10${superscript(power)}`;
  }

  const value = (of, i, which) => (which < 0 ? of.lm(i) : of.mix(i, which, p(which)));
  function gain(of, i) {
    const [a, b] = [value(of, i, state.system), value(of, i, state.against)];
    return a === b ? 0 : a - b;
  }
  function step(x) {
    const size = LIMITS.filter((limit) => Math.abs(x) >= limit).length;
    return x < 0 && size ? `-${size}` : String(size);
  }
  const shortName = (which) => (which < 0 ? "base" : state.systems.length > 1 ? state.systems[which].name : "mixture");

  // The texts

  function tokenSpan(of, i) {
    const text = of.texts[i], span = make("span", { role: "button", tabindex: "-1", "data-i": i, "aria-pressed": "false" });
    // A token that completes no character has nothing to show, and still is a place to click.
    return text ? append(span, text) : append(span, "·");
  }

  function drawTexts() {
    blocks = leaf().passages.map((of, side) => {
      const text = make("div", { class: "text", role: "group", "data-side": side, "aria-label": `${of.name || "Text"}, one button a token` });
      if (of.cut[0]) text.append(make("span", { class: "cut" }, "…"));
      const spans = of.texts.map((_, i) => tokenSpan(of, i));
      text.append(...spans);
      if (of.cut[1]) text.append(make("span", { class: "cut" }, "…"));
      const sums = make("p", { class: "sums", role: "status" });
      const block = make("div", { class: "passage" });
      if (leaf().passages.length > 1) block.append(make("h3", {}, of.name));
      block.append(sums, text);
      if (of.note) block.append(make("p", { class: "note" }, of.note));
      return { of, text, spans, sums, block };
    });
    texts.className = leaf().passages.length > 1 ? "pair" : "";
    texts.replaceChildren(...blocks.map(({ block }) => block));
  }

  function color({ of, spans, sums }) {
    const gains = spans.map((span, i) => {
      const change = gain(of, i);
      span.className = `t d${step(change)}${of.texts[i].length < 2 ? " one" : ""}`;
      span.setAttribute("aria-label", `${spoken(of.texts[i])}, ${signed(change)} nats`);
      return change;
    });
    if (!gains.length) return sums.replaceChildren();
    const [base, mix] = [state.against, state.system].map((which) => perplexity(of.texts.map((_, i) => value(of, i, which))));
    const change = Math.exp(-mean(gains)) - 1;
    const names = [state.against < 0 ? "base LM" : shortName(state.against), shortName(state.system)];
    sums.dataset.base = base;
    sums.dataset.mixture = mix;
    const copied = of.copied.filter((run) => run > 0).length;
    sums.replaceChildren(`Perplexity of these ${gains.length} tokens: ${names[0]} `, make("strong", {}, figure(base)),
      `, ${names[1]} `, make("strong", { class: "value" }, figure(mix)),
      Number.isFinite(change) ? ` (${change < 0 ? "−" : "+"}${Math.abs(100 * change).toFixed(1)}\u00a0%)` : "",
      copied ? `. ${copied} of them stand in the datastore to the letter, in runs of 16 or more.` : ".");
  }

  function drawLegend() {
    const { lmbda } = p(), against = state.against < 0;
    const most = against ? -Math.log1p(-lmbda) : Infinity; // that a token can lose
    const all = [-4, -3, -2, -1, 0, 1, 2, 3, 4].filter((at) => at === 0 || (at < 0 ? most >= LIMITS[-at - 1] : !against || lmbda > 0));
    // A number stands where one colour ends and the next begins.
    const edge = (at) => (at > 0 ? `+${LIMITS[at - 1]}` : `−${LIMITS[-at]}`);
    const steps = all.map((at, i) => make("span", { class: "step" }, make("span", { class: `swatch d${at}` }),
      i ? make("span", { class: "edge" }, edge(at)) : ""));
    const names = [state.against, state.system].map(shortName);
    byId("legend").setAttribute("aria-label", `Colours: orange where ${names[1]} gives the token less than ${names[0]}, ` +
      "blue where it gives more, in steps at 0.1, 0.3, 0.8 and 2 nats");
    byId("legend").replaceChildren(make("span", { class: "scale" },
      make("span", { class: "ends" }, make("span", {}, `${names[0]} better`), make("span", {}, `${names[1]} better`)),
      make("span", { class: "steps" }, ...steps)));
    if (against && lmbda > 0 && lmbda < 1) byId("legend").append(make("span", { class: "most" },
      `A token can lose at most −log(1 − λ) = ${most.toFixed(2)} nats.`));
  }

  // The panel

  function meter(share, kind = "mix") {
    const fill = make("i", { class: kind });
    fill.style.width = `${(100 * Math.min(1, Math.max(0, share))).toFixed(2)}%`;
    return make("div", { class: "meter", "aria-hidden": "true" }, fill);
  }

  // Bars of one list are drawn against its largest, which is often far below 1.
  function probabilityList(rows) {
    const list = make("dl", { class: "probs" }), most = Math.max(...rows.map(([, share]) => share), 1e-300);
    for (const [name, share, kind, strong, shown] of rows)
      list.append(make("dt", strong ? { class: "target" } : {}, name), make("dd", {}, meter(share / most, kind)),
        make("dd", { class: strong ? "num target" : "num" }, shown || chance(share)));
    return list;
  }

  // All three p of the likeliest tokens, as bars in a table.
  function topTable(of, i, rows) {
    const most = Math.max(...rows.flatMap((row) => [row.lm, row.knn, row.mix])), target = of.target(i), heads = [["base LM", "lm"], ["neighbors", "knn"], ["mixture", "mix"]];
    const body = rows.map((row) => {
      const own = same(row.id, target);
      return make("tr", own ? { class: "target" } : {}, make("th", { scope: "row" }, make("code", {}, label(of.word(row.id)))),
        ...heads.map(([, kind]) => make("td", {}, make("span", {}, chance(row[kind])), meter(row[kind] / most, kind))));
    });
    return make("table", { class: "top" }, make("caption", { class: "sr" }, "Probabilities of the likeliest tokens"),
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "token"), ...heads.map(([name]) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...body));
  }

  function why(of, i, rows) {
    const best = (kind) => rows.reduce((a, b) => (b[kind] > a[kind] ? b : a));
    const [lm, mix] = [best("lm"), best("mix")], name = (row) => make("code", {}, label(of.word(row.id)));
    if (same(lm.id, mix.id)) return make("p", { class: "why" }, "Likeliest with and without the neighbors: ", name(lm), ".");
    return make("p", { class: "why" }, "Likeliest of the mixture: ", name(mix), ", to which the neighbors give ",
      `${chance(mix.knn)}; the base LM alone would say `, name(lm), ` (${chance(lm.lm)}).`);
  }

  // A row of the datastore as text, the token marked, and what is to be said of it.
  function rowItem(span, hit, facts) {
    const line = make("pre", {});
    append(line, span.before.replace(/^(…?)\s*\n/, "… "));
    line.append(append(make("mark", hit ? { class: "hit" } : {}), span.token));
    append(line, span.after.replace(/\s+(…?)$/, "$1"));
    const said = make("p", {}, append(make("span", { class: "file" }), span.document || "source not kept"),
      ...facts.map((fact) => make("span", {}, fact)));
    return make("li", { class: "row" }, line, said);
  }
  function neighborItem(of, i, neighbor, span) {
    const hit = same(neighbor.id, of.target(i));
    const item = rowItem(span, hit, [`distance ${neighbor.distance.toPrecision(4)}`, `share ${percent(neighbor.share)}`]);
    if (hit) item.lastChild.append(make("span", { class: "sr" }, "has the target"));
    return item;
  }

  let drawn = 0;
  async function fillNeighbors(list, of, i, neighbors) {
    const turn = ++drawn;
    try {
      const spans = await of.spans(neighbors.map((one) => one.row));
      if (turn === drawn) list.replaceChildren(...neighbors.map((one, j) => neighborItem(of, i, one, spans[j])));
    } catch (error) {
      if (turn === drawn) list.replaceChildren(make("li", { class: "note" }, `The neighbors' text did not come: ${error.message}`));
    }
    place();
  }

  function systemRows(of, i) {
    const rows = [["base LM", Math.exp(of.lm(i)), "lm"]];
    if (state.systems.length < 2)
      return [...rows, ["neighbors", Math.exp(of.knn(i, 0, p())), "knn"], ["mixture", Math.exp(of.mix(i, 0, p())), "mix", true]];
    rows.push([`neighbors of ${shortName(state.system)}`, Math.exp(of.knn(i, state.system, p())), "knn"]);
    state.systems.forEach((system, s) => rows.push([system.name, Math.exp(of.mix(i, s, p(s))), "mix", s === state.system]));
    return rows;
  }

  function drawPanel() {
    const of = passage(), i = state.i;
    if (i < 0 || i >= of.length) return token.replaceChildren(make("p", { class: "note" }, "Choose a token to see its neighbors."));
    const change = gain(of, i), names = [state.against, state.system].map(shortName);
    const rows = of.top(i, state.system, p()), neighbors = of.neighbors(i, state.system, p());
    const parts = [make("h3", {}, "Token ", make("code", {}, label(of.texts[i] || of.word(of.target(i))))),
      make("p", { class: "delta" }, make("strong", {}, `${signed(change)} nats`),
        ` log p(${names[1]}) − log p(${names[0]}): ${change >= 0 ? "×" : "÷"}${factor(Math.exp(Math.abs(change)))}`)];
    if (of.copied[i]) parts.push(make("p", { class: "note" }, `One of ${of.copied[i]} tokens on end that the datastore holds to the letter.`));
    if (of.remixable) parts.push(why(of, i, rows), topTable(of, i, rows));
    else parts.push(probabilityList(systemRows(of, i)));
    if (!neighbors.length) parts.push(make("p", { class: "note" }, "This token has no neighbors."));
    else {
      const shown = state.more ? neighbors : neighbors.slice(0, SHOWN);
      const share = shown.reduce((sum, one) => sum + one.share, 0);
      const list = make("ol", { id: "neighbors" });
      if (!of.remixable) parts.push(make("div", { class: "votes" }, make("h4", {}, "What the neighbors vote for"), probabilityList(rows.map((row) =>
        [make("code", {}, label(of.word(row.id))), row.knn, "knn", same(row.id, of.target(i)), percent(row.knn)]))));
      parts.push(make("h4", {}, `Nearest ${shown.length} of ${p().k.toLocaleString("en")} neighbors, ${percent(share)} of p(kNN)`), list);
      if (neighbors.length > SHOWN) {
        const button = make("button", { type: "button", id: "more" }, state.more ? "Show fewer" : `Show ${neighbors.length}`);
        button.addEventListener("click", () => { state.more = !state.more; drawPanel(); byId("more").focus(); });
        parts.push(button);
      }
      fillNeighbors(list, of, i, shown);
    }
    token.replaceChildren(...parts);
    place();
    byId("status").textContent = `${spoken(of.texts[i])}: base ${chance(Math.exp(of.lm(i)))}, neighbors ` +
      `${chance(Math.exp(of.knn(i, state.system, p())))}, mixture ${chance(Math.exp(of.mix(i, state.system, p())))}, ${signed(change)} nats`;
  }

  // A panel taller than the window goes with the page until its foot is seen, instead of scrolling
  // inside the page.
  function place() {
    panel.style.setProperty("--top", `${Math.min(16, innerHeight - panel.offsetHeight - 16)}px`);
  }
  new ResizeObserver(place).observe(panel);
  addEventListener("resize", place);

  function openSheet(open) {
    for (const [element, name] of [[panel, "open"], [document.body, "sheet"]]) element.classList.toggle(name, open && NARROW.matches);
  }
  NARROW.addEventListener("change", () => openSheet(false));

  // Choosing

  function choose(side, i, { focus = false, open = true, quiet = false } = {}) {
    const block = blocks[side];
    if (!block || i < 0 || i >= block.spans.length) return;
    const before = blocks[state.side]?.spans[state.i], span = block.spans[i];
    if (before) {
      before.setAttribute("aria-pressed", "false");
      before.tabIndex = -1;
    }
    Object.assign(state, { side, i });
    span.setAttribute("aria-pressed", "true");
    span.tabIndex = 0;
    if (open) openSheet(true);
    drawPanel();
    if (!quiet) writeAddress();
    if (focus) span.focus({ preventScroll: true });
    if (open && NARROW.matches) reveal("nearest"); // the sheet may have come up over it
  }

  // Into what the sheet leaves free of the window, by style.css.
  function reveal(block = "center") {
    const span = blocks[state.side].spans[state.i];
    if (span) span.scrollIntoView({ block });
  }

  // The next token in order of gain (direction 1) or loss (-1), starting over after the last.
  function jump(direction) {
    const all = blocks.flatMap(({ of, spans }, side) => spans.map((_, i) => ({ side, i, gain: gain(of, i) })));
    const order = all.sort((a, b) => direction * (b.gain - a.gain) || a.side - b.side || a.i - b.i);
    if (!order.length) return;
    const at = order.findIndex((one) => one.side === state.side && one.i === state.i);
    const next = order[at >= 0 && jump.direction === direction ? (at + 1) % order.length : 0];
    jump.direction = direction;
    choose(next.side, next.i, { focus: true });
    reveal();
  }

  function lineNeighbor(direction) {
    const { spans } = blocks[state.side], here = spans[state.i].getBoundingClientRect();
    let best = -1, distance = Infinity, line = null;
    for (let i = state.i + direction; i >= 0 && i < spans.length; i += direction) {
      const box = spans[i].getBoundingClientRect();
      if (Math.abs(box.top - here.top) < 4) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) >= 4) break;
      if (Math.abs(box.left - here.left) < distance) [best, distance] = [i, Math.abs(box.left - here.left)];
    }
    return best;
  }

  const MOVES = {
    ArrowRight: () => state.i + 1, ArrowLeft: () => state.i - 1, Home: () => 0, End: () => blocks[state.side].spans.length - 1,
    ArrowDown: () => lineNeighbor(1), ArrowUp: () => lineNeighbor(-1), Enter: null, " ": null,
  };
  const tokenOf = (event) => {
    const span = event.target.closest?.(".t");
    return span && { side: Number(span.parentElement.dataset.side), i: Number(span.dataset.i) };
  };
  texts.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "g" || event.key === "l") return jump(event.key === "g" ? 1 : -1);
    const at = tokenOf(event);
    if (!at || !(event.key in MOVES)) return;
    event.preventDefault();
    const move = MOVES[event.key];
    choose(at.side, move ? move() : at.i, { focus: true });
    reveal("nearest");
  });
  texts.addEventListener("click", (event) => {
    const at = tokenOf(event);
    if (at) choose(at.side, at.i, { focus: true });
  });
  texts.addEventListener("focusin", (event) => {
    const at = tokenOf(event);
    if (at && (at.side !== state.side || at.i !== state.i)) choose(at.side, at.i);
  });
  byId("gain").addEventListener("click", () => jump(1));
  byId("loss").addEventListener("click", () => jump(-1));
  byId("close").addEventListener("click", close);
  addEventListener("keydown", (event) => { if (event.key === "Escape" && panel.classList.contains("open")) close(); });
  function close() {
    openSheet(false);
    blocks[state.side]?.spans[state.i]?.focus({ preventScroll: true });
  }

  // Search in the text

  const finds = { words: "", at: -1, hits: [] };
  function find(words, next) {
    if (words === finds.words && next) finds.at = (finds.at + 1) % Math.max(1, finds.hits.length);
    else {
      Object.assign(finds, { words, at: 0, hits: [] });
      if (words) state.leaves.forEach((one, l) => one.passages.forEach((of, side) => findIn(of, l, side, words.toLowerCase())));
    }
    const hit = finds.hits[finds.at];
    byId("found").textContent = !words ? "" : hit ? `${finds.at + 1} of ${finds.hits.length}` : "not found";
    if (hit) {
      if (hit.leaf !== state.leaf) showLeaf(hit.leaf);
      choose(hit.side, hit.first, { open: !NARROW.matches });
      reveal();
    }
    markFound();
  }
  function findIn(of, l, side, words) {
    const ends = [];
    let text = "";
    for (const one of of.texts) ends.push((text += one.toLowerCase()).length);
    for (let at = text.indexOf(words); at >= 0; at = text.indexOf(words, at + words.length)) {
      const first = ends.findIndex((end) => end > at), last = ends.findIndex((end) => end >= at + words.length);
      finds.hits.push({ leaf: l, side, first, last });
    }
  }
  function markFound() {
    for (const span of texts.querySelectorAll(".found")) span.classList.remove("found");
    for (const { leaf: l, side, first, last } of finds.hits)
      if (l === state.leaf) for (let i = first; i <= last; i++) blocks[side].spans[i]?.classList.add("found");
  }
  byId("find").addEventListener("input", (event) => find(event.target.value, false));
  byId("find").addEventListener("keydown", (event) => { if (event.key === "Enter") find(event.target.value, true); });

  // The mixture: each has a slider for the hand and a field for the number

  const SLIDERS = {
    temperature: { to: (x, t) => t.temperature * 10 ** (x / 100), from: (v, t) => 100 * Math.log10(v / t.temperature), ok: (v) => v > 0 },
    lmbda: { to: (x) => x, from: (v) => v, ok: (v) => v >= 0 && v <= 1 },
    k: { to: (x, t) => Math.round(t.k ** (x / 100)), from: (v, t) => (t.k > 1 ? (100 * Math.log(v)) / Math.log(t.k) : 100),
      ok: (v, t) => Number.isInteger(v) && v >= 1 && v <= t.k },
  };
  function set(name, number, from) {
    p()[name] = number;
    showSettings(from);
    refresh();
    writeAddress();
  }
  for (const [name, { to, ok }] of Object.entries(SLIDERS)) {
    byId(`${name}-slide`).addEventListener("input", (event) => set(name, to(Number(event.target.value), tuned[state.system]), event.target));
    byId(name).addEventListener("input", (event) => {
      const good = event.target.value !== "" && ok(Number(event.target.value), tuned[state.system]);
      event.target.setAttribute("aria-invalid", String(!good));
      if (good) set(name, Number(event.target.value), event.target);
    });
  }
  byId("as-tuned").addEventListener("click", () => {
    settings[state.system] = { ...tuned[state.system] };
    showSettings();
    refresh();
    writeAddress();
  });
  function showSettings(from) {
    for (const [name, { from: back }] of Object.entries(SLIDERS)) {
      const slide = byId(`${name}-slide`), field = byId(name), number = p()[name];
      if (slide !== from) slide.value = back(number, tuned[state.system]);
      if (field !== from) {
        field.value = name === "k" ? number : Number(number.toPrecision(4));
        field.setAttribute("aria-invalid", "false");
      }
      slide.setAttribute("aria-valuetext", `${name} ${field.value}`);
    }
    byId("as-tuned").disabled = Object.keys(SLIDERS).every((name) => p()[name] === tuned[state.system][name]);
  }

  function refresh() {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => {
      blocks.forEach(color);
      markFound();
      drawLegend();
      if (state.i >= 0) drawPanel();
    });
  }

  // The address leads to what is shown

  function readAddress() {
    return new URLSearchParams(location.hash.slice(1));
  }
  function writeAddress(extra = {}) {
    const address = readAddress(), t = tuned[state.system] || {};
    const moved = (name) => (p() && p()[name] !== t[name] ? String(p()[name]) : null);
    const found = {
      excerpt: state.leaves.length > 1 ? state.leaf + 1 : null, side: state.side ? state.side + 1 : null,
      token: state.i >= 0 ? state.i + 1 : null, system: state.system ? state.system + 1 : null,
      against: state.against >= 0 ? state.against + 1 : null,
      temperature: moved("temperature"), lmbda: moved("lmbda"), k: moved("k"), ...extra,
    };
    for (const [name, one] of [...address]) if (one === "") address.delete(name); // of a heading
    for (const [name, one] of Object.entries(found)) one === null ? address.delete(name) : address.set(name, one);
    if (address.toString() !== readAddress().toString()) history.replaceState(null, "", `#${address}`);
  }
  function number(address, name, least, most) {
    const found = Number(address.get(name));
    return address.has(name) && Number.isInteger(found) && found >= least && found <= most ? found : null;
  }
  // The systems and settings that an address names; what makes no sense is passed over.
  function readSettings(address) {
    const count = state.systems.length;
    state.system = (number(address, "system", 1, count) || 1) - 1;
    state.against = (number(address, "against", 1, count) || 0) - 1;
    for (const name of Object.keys(SLIDERS)) {
      const found = Number(address.get(name));
      if (address.get(name) && SLIDERS[name].ok(found, tuned[state.system])) p()[name] = found;
    }
  }
  // The token that an address names, else the one that a passage is opened at.
  function openAt(address) {
    const side = (number(address, "side", 1, blocks.length) || 1) - 1;
    const i = number(address, "token", 1, blocks[side].spans.length);
    if (i) {
      choose(side, i - 1);
      reveal();
    } else if (blocks[0].spans.length) choose(0, blocks[0].of.start || 0, { open: !NARROW.matches, quiet: true });
  }

  // Leaves and systems

  function showLeaf(n) {
    Object.assign(state, { leaf: n, side: 0, i: -1, more: false });
    byId("excerpt").value = String(n);
    drawTexts();
    blocks.forEach(color);
    drawLegend();
    drawPanel();
    markFound();
  }
  function options(select, names, first = 0) {
    select.replaceChildren(...names.map((name, i) => make("option", { value: i + first }, name)));
  }
  byId("excerpt").addEventListener("change", (event) => {
    showLeaf(Number(event.target.value));
    openAt(new URLSearchParams());
    writeAddress();
  });
  for (const name of ["system", "against"]) byId(name).addEventListener("change", (event) => {
    state[name] = Number(event.target.value);
    showSettings();
    refresh();
    writeAddress();
  });

  // Begin: systems are [{name, temperature, lmbda, k}], of which the first is shown.
  function start(systems) {
    state.systems = systems;
    tuned = systems.map(({ temperature, lmbda, k }) => ({ temperature, lmbda, k }));
    settings = tuned.map((one) => ({ ...one }));
    options(byId("system"), systems.map((one) => one.name));
    options(byId("against"), ["base LM", ...systems.map((one) => one.name)], -1);
    for (const name of ["system", "against"]) byId(name).closest(".choice").hidden = systems.length < 2;
    readSettings(readAddress());
    byId("system").value = state.system;
    byId("against").value = state.against;
    showSettings();
  }
  // Show leaves: [{name, passages}].
  function show(leaves, address = readAddress()) {
    state.leaves = leaves;
    options(byId("excerpt"), leaves.map((one) => one.name));
    byId("excerpt").closest(".choice").hidden = leaves.length < 2;
    byId("choosers").hidden = leaves.length < 2 && state.systems.length < 2;
    const remixable = leaves.every((one) => one.passages.every((of) => of.remixable));
    for (const name of ["temperature", "k"]) byId(`${name}-row`).hidden = !remixable;
    root.hidden = false;
    showLeaf((number(address, "excerpt", 1, leaves.length) || 1) - 1);
    openAt(address);
  }
  // A token has been added to a passage that is shown.
  function grow(side) {
    const block = blocks[side], span = tokenSpan(block.of, block.spans.length);
    block.spans.push(span);
    block.text.append(span);
    color(block);
    if (state.i < 0) choose(side, 0, { open: !NARROW.matches, quiet: true });
  }
  const NAMES = ["excerpt", "side", "token", "system", "against", ...Object.keys(SLIDERS)];
  addEventListener("hashchange", () => {
    const address = readAddress();
    // A link to a heading moves the page and nothing else.
    if (!state.leaves.length || !NAMES.some((name) => address.has(name))) return;
    settings = tuned.map((one) => ({ ...one }));
    readSettings(address);
    showSettings();
    showLeaf((number(address, "excerpt", 1, state.leaves.length) || 1) - 1);
    openAt(address);
  });

  return { start, show, grow, make, append, label, percent, rowItem, readAddress, writeAddress, settings: () => p() };
})();
