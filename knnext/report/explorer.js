// The token explorer. Text goes in through textContent only: a corpus may hold any markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const byId = (id) => document.getElementById(id);
  const text = byId("text"), panel = byId("panel"), chooser = byId("excerpt");
  const LIMITS = [0.1, 0.3, 0.8, 2]; // nats; the same on both sides
  let excerpt = null, chosen = -1;

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // What cannot be seen gets a sign: line ends, tabs, control characters.
  const SIGNS = /[\n\t\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
  function sign(character) {
    if (character === "\n") return "⏎";
    if (character === "\t") return "⇥";
    const code = character.codePointAt(0);
    return code < 0x20 ? String.fromCodePoint(0x2400 + code) : `⟨${code.toString(16)}⟩`;
  }
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

  const word = (id) => data.vocab[id];
  const log = (x) => (x === null ? -Infinity : x); // JSON has no infinity
  const gain = (i) => log(excerpt.mix[i]) - log(excerpt.lm[i]);
  const signed = (x) => (x < 0 ? "−" : "+") + (Number.isFinite(x) ? Math.abs(x).toFixed(2) : "∞");
  const percent = (x) => (x >= 0.0995 ? (100 * x).toFixed(0) : (100 * x).toFixed(x >= 0.01 ? 1 : 2)) + " %";

  function probability(logP) {
    if (logP === -Infinity) return "0";
    const p = Math.exp(logP);
    if (p >= 0.001) return p.toFixed(3);
    const power = Math.floor(logP / Math.LN10);
    return `${Math.exp(logP - power * Math.LN10).toFixed(1)}·10${superscript(power)}`;
  }
  const factor = (x) => (x >= 100 ? Math.round(x).toLocaleString("en") : x.toPrecision(3));
  const superscript = (n) => String(n).replace(/[-0-9]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);

  function step(x) {
    const size = LIMITS.filter((limit) => Math.abs(x) >= limit).length;
    return x < 0 && size ? `-${size}` : String(size);
  }

  function showExcerpt(number) {
    excerpt = data.excerpts[number];
    chooser.value = String(number);
    text.replaceChildren(...excerpt.targets.map((id, i) => {
      const token = make("span", {
        class: `t d${step(gain(i))}`, role: "button", tabindex: "-1", "data-i": i,
        "aria-pressed": "false", "aria-label": `${label(word(id))}, ${signed(gain(i))} nats`,
      });
      return append(token, word(id));
    }));
    const total = excerpt.targets.reduce((sum, _, i) => sum + gain(i), 0);
    byId("excerpt-note").textContent =
      `${excerpt.targets.length} tokens of ${excerpt.name}, from its token ${excerpt.first + 1} on. ` +
      `Mean gain here: ${signed(total / excerpt.targets.length)} nats a token.`;
    chosen = -1;
  }

  function choose(i, focus) {
    const tokens = text.children;
    if (i < 0 || i >= tokens.length) return;
    if (chosen >= 0) {
      tokens[chosen].setAttribute("aria-pressed", "false");
      tokens[chosen].tabIndex = -1;
    }
    tokens[i].setAttribute("aria-pressed", "true");
    tokens[i].tabIndex = 0;
    if (chosen !== i) {
      chosen = i;
      showToken(i);
    }
    if (focus) tokens[i].focus();
  }

  function meter(share) {
    const fill = make("i", {});
    fill.style.width = `${(100 * Math.min(1, Math.max(0, share))).toFixed(2)}%`;
    return make("div", { class: "meter", "aria-hidden": "true" }, fill);
  }

  function probabilityList(rows) {
    const list = make("dl", { class: "probs" });
    for (const [name, share, figure, target] of rows) {
      list.append(
        make("dt", target ? { class: "target" } : {}, name),
        make("dd", {}, meter(share)),
        make("dd", { class: target ? "num target" : "num" }, figure),
      );
    }
    return list;
  }

  function neighborItem(target, span, distance, share) {
    const [before, id, after, file] = data.spans[span];
    const line = make("pre", {});
    append(line, before.replace(/^\s*\n/, "… "));
    const hit = id === target;
    line.append(append(make("mark", hit ? { class: "hit" } : {}), word(id)));
    append(line, after.replace(/\s+$/, ""));
    const facts = make("p", {}, make("span", { class: "file" }, data.documents[file] || "source not kept"),
      make("span", {}, `distance ${distance.toPrecision(4)}`), make("span", {}, `share ${percent(share)}`));
    if (hit) facts.append(make("span", { class: "sr" }, "has the target"));
    return make("li", {}, line, facts);
  }

  function showToken(i) {
    const target = excerpt.targets[i], near = excerpt.near[i], votes = excerpt.votes[i];
    const change = gain(i), [lm, knn, mix] = [excerpt.lm[i], excerpt.knn[i], excerpt.mix[i]].map(log);
    const heading = make("h3", {}, "Target ", make("code", {}, label(word(target))));
    const delta = make("p", { class: "delta" }, make("strong", {}, `${signed(change)} nats`),
      ` log p(mixture) − log p(base): ${change >= 0 ? "×" : "÷"}${factor(Math.exp(Math.abs(change)))}`);
    const rows = [["base LM", lm], ["neighbors", knn], ["mixture", mix]];
    const probs = probabilityList(rows.map(([name, logP]) => [name, Math.exp(logP), probability(logP), name === "mixture"]));
    const tallies = [];
    for (let j = 0; j < votes.length; j += 2)
      tallies.push([make("code", {}, label(word(votes[j]))), votes[j + 1], percent(votes[j + 1]), votes[j] === target]);
    const list = make("ol", { id: "neighbors" });
    let shown = 0;
    for (let j = 0; j < near.length; j += 3) {
      list.append(neighborItem(target, near[j], near[j + 1], near[j + 2]));
      shown += near[j + 2];
    }
    const count = near.length / 3;
    panel.replaceChildren(heading, delta, probs);
    if (count === 0) panel.append(make("p", { class: "note" }, "This token has no neighbors."));
    else panel.append(
      make("div", { class: "votes" }, make("h4", {}, "What the neighbors vote for"), probabilityList(tallies)),
      make("h4", {}, `Nearest ${count} of ${data.k} neighbors, ${percent(shown)} of p(kNN)`), list);
    panel.scrollTop = 0;
    byId("status").textContent = `${label(word(target))}: base ${probability(lm)}, neighbors ` +
      `${probability(knn)}, mixture ${probability(mix)}, ${signed(change)} nats`;
  }

  // The next token in order of gain (direction 1) or loss (-1), starting over after the last.
  function jump(direction) {
    const order = excerpt.targets.map((_, i) => i).sort((a, b) => direction * (gain(b) - gain(a)) || a - b);
    const at = order.indexOf(chosen);
    const inOrder = chosen >= 0 && jump.direction === direction;
    jump.direction = direction;
    choose(order[inOrder ? (at + 1) % order.length : 0], true);
    text.children[chosen].scrollIntoView({ block: "center" });
  }

  function lineNeighbor(direction) {
    const here = text.children[chosen].getBoundingClientRect();
    let best = -1, distance = Infinity, line = null;
    for (let i = chosen + direction; i >= 0 && i < text.children.length; i += direction) {
      const box = text.children[i].getBoundingClientRect();
      if (Math.abs(box.top - here.top) < 4) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) >= 4) break;
      if (Math.abs(box.left - here.left) < distance) [best, distance] = [i, Math.abs(box.left - here.left)];
    }
    return best;
  }

  const MOVES = {
    ArrowRight: () => chosen + 1, ArrowLeft: () => chosen - 1, Home: () => 0,
    End: () => text.children.length - 1, ArrowDown: () => lineNeighbor(1), ArrowUp: () => lineNeighbor(-1),
    Enter: null, " ": null,
  };
  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "g" || event.key === "l") return jump(event.key === "g" ? 1 : -1);
    const token = event.target.closest(".t");
    if (!token || !(event.key in MOVES)) return;
    event.preventDefault();
    const move = MOVES[event.key];
    choose(move ? move() : Number(token.dataset.i), true);
  });
  text.addEventListener("click", (event) => {
    const token = event.target.closest(".t");
    if (token) choose(Number(token.dataset.i), true);
  });
  text.addEventListener("focusin", (event) => {
    const token = event.target.closest(".t");
    if (token) choose(Number(token.dataset.i), false);
  });
  chooser.addEventListener("change", () => open(Number(chooser.value)));
  byId("gain").addEventListener("click", () => jump(1));
  byId("loss").addEventListener("click", () => jump(-1));

  function drawLegend() {
    const names = [["≤ −2", -4], ["−0.8", -3], ["−0.3", -2], ["−0.1", -1], ["0", 0], ["+0.1", 1], ["+0.3", 2],
      ["+0.8", 3], ["≥ +2", 4]];
    const steps = names.map(([name, at]) =>
      make("span", { class: "step" }, make("span", { class: `swatch d${at}` }), name));
    const legend = byId("legend");
    legend.setAttribute("aria-label", "Colours: orange where the mixture gives the token less than the base, " +
      "blue where it gives more, in steps at 0.1, 0.3, 0.8 and 2 nats");
    legend.append(make("span", { class: "scale" },
      make("span", { class: "ends" }, make("span", {}, "base better"), make("span", {}, "mixture better")),
      make("span", { class: "steps" }, ...steps)));
    if (data.lmbda < 1) legend.append(make("span", {},
      `A token can lose at most −log(1 − λ) = ${(-Math.log1p(-data.lmbda)).toFixed(2)} nats.`));
  }

  function open(number) {
    showExcerpt(number);
    const gains = excerpt.targets.map((_, i) => gain(i));
    choose(gains.indexOf(Math.max(...gains)), false);
  }

  data.excerpts.forEach((one, i) => chooser.append(make("option", { value: i }, one.name)));
  drawLegend();
  if (data.excerpts.length) open(0);
  else byId("explorer").hidden = true;
})();
