// The explore page's own part: what is typed goes to the server, what comes back into the explorer.
"use strict";
(() => {
  const E = knnextExplorer, { Whole, Grown } = knnextPassages;
  const facts = JSON.parse(document.getElementById("explorer-data").textContent);
  const byId = (id) => document.getElementById(id);
  const typed = byId("typed"), said = byId("said");
  const KEY = new URLSearchParams(location.search).get("token") || "";
  const LONGEST_IN_ADDRESS = 2000; // characters
  const BUTTONS = ["read", "write", "nearest", "occurrences"];
  let running = null;

  function say(words, wrong = false) {
    said.textContent = words;
    said.classList.toggle("wrong", wrong);
  }

  async function ask(what, body, signal) {
    const answer = await fetch(`api/${what}`, {
      method: "POST", signal, body: JSON.stringify(body),
      headers: { "content-type": "application/json", "x-knnext-token": KEY },
    });
    if (answer.ok) return answer;
    const found = await answer.json().catch(() => ({}));
    throw new Error(found.error || `the server answered ${answer.status}`);
  }

  // Rows as text, each asked for once.
  const known = new Map();
  async function spans(rows) {
    const missing = rows.filter((row) => !known.has(row));
    if (missing.length) {
      const found = await (await ask("spans", { rows: missing })).json();
      for (const one of found) known.set(one.row, one);
    }
    return rows.map((row) => known.get(row));
  }

  // One question at a time; a second one, or Stop, ends the first.
  async function during(words, work) {
    if (running) running.abort();
    const own = (running = new AbortController());
    say(words);
    busy(true);
    try {
      await work(own.signal);
    } catch (error) {
      if (error.name !== "AbortError")
        say(error instanceof TypeError ? "The program does not answer: has it been ended?" : error.message, true);
      else if (running === own) say("Stopped.");
    } finally {
      if (running === own) {
        running = null;
        busy(false);
      }
    }
  }
  function busy(is) {
    byId("stop").hidden = !is;
    document.body.setAttribute("aria-busy", String(is));
  }

  function text() {
    if (typed.value.trim()) return typed.value;
    say("Type or paste a text first.", true);
    typed.focus();
    return null;
  }
  function keepText(value, what) {
    const kept = value.length <= LONGEST_IN_ADDRESS;
    E.writeAddress({ text: kept ? value : null, ask: kept && what !== "read" ? what : null });
  }
  function only(shown) {
    for (const name of ["explorer", "hits"]) byId(name).hidden = name !== shown;
  }
  // What was asked for is seen where it begins too far below.
  function bring(name) {
    const place = byId(name);
    if (place.getBoundingClientRect().top > innerHeight / 2) place.scrollIntoView();
  }
  const fresh = () => new URLSearchParams();

  function read(address = fresh()) {
    const value = text();
    if (value === null) return;
    during("Reading …", async (signal) => {
      const raw = await (await ask("read", { text: value }, signal)).json();
      const of = new Whole(raw, spans);
      of.note = raw.note;
      only("explorer");
      E.show([{ name: of.name, passages: [of] }], address);
      bring("explorer");
      keepText(value, "read");
      say("");
    });
  }

  function write() {
    const value = text(), tokens = Number(byId("tokens").value);
    if (value === null) return;
    if (!Number.isInteger(tokens) || tokens < 1 || tokens > facts.max_new_tokens)
      return say(`new tokens must be a whole number from 1 to ${facts.max_new_tokens}`, true);
    during("Writing …", async (signal) => {
      const seed = Math.floor(Math.random() * 2 ** 31), draw = byId("how").value === "draw";
      const answer = await ask("write", { text: value, tokens, draw, seed, ...E.settings() }, signal);
      const sides = ["mixture", "base"], names = ["With the neighbors", "The base LM alone"];
      const passages = names.map((name) => new Grown(name));
      only("explorer");
      E.show([{ name: "continuation", passages }], fresh());
      bring("explorer");
      keepText(value, "write");
      let count = 0, note = "";
      for await (const step of lines(answer.body)) {
        if (step.error) throw new Error(step.error);
        note ||= step.note || "";
        if (!step.side || running?.signal !== signal) continue;
        const side = sides.indexOf(step.side);
        passages[side].push(new Whole(step, spans));
        E.grow(side);
        if (side === 0) say(`Writing … ${++count} tokens`);
      }
      say(note);
    });
  }

  async function* lines(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield JSON.parse(part);
    }
  }

  function nearest() {
    const value = text();
    if (value === null) return;
    during("Searching …", async (signal) => {
      const found = await (await ask("nearest", { text: value, count: 16 }, signal)).json();
      list(`The nearest of the states after your text, each with the token that followed it. ${found.note}`,
        found.neighbors.map((one) => hit(one, [`distance ${one.distance.toPrecision(4)}`, `share ${E.percent(one.share)}`])));
      keepText(value, "nearest");
    });
  }

  function occurrences() {
    const value = text();
    if (value === null) return;
    during("Searching …", async (signal) => {
      const found = await (await ask("occurrences", { text: value, count: 32 }, signal)).json();
      const count = found.total.toLocaleString("en");
      list(found.total ? `${count} ${found.total === 1 ? "place" : "places"} hold your text to the letter` +
        `${found.total > found.occurrences.length ? `, of which ${found.occurrences.length} are shown` : ""}; its first token is marked.`
        : "Your text, token by token as it stands, is not in the datastore.",
      found.occurrences.map((one) => hit(one, [`row ${one.row.toLocaleString("en")}`])));
      keepText(value, "occurrences");
    });
  }

  const hit = (one, facts) => E.rowItem(one, true, facts);
  function list(note, items) {
    only("hits");
    byId("hits-note").textContent = note;
    byId("hit-list").replaceChildren(...items);
    bring("hits");
    say("");
  }

  const ASKED = { read, write, nearest, occurrences };
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    read();
  });
  for (const what of BUTTONS.slice(1)) byId(what).addEventListener("click", () => ASKED[what]());
  byId("stop").addEventListener("click", () => running?.abort());
  typed.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      read();
    }
  });
  byId("tokens").max = facts.max_new_tokens;
  E.start([{ name: "mixture", words: "", temperature: facts.temperature, lmbda: facts.lmbda, k: facts.k }]);
  const address = E.readAddress();
  if (address.get("text")) {
    typed.value = address.get("text");
    if (address.has("ask") && Object.hasOwn(ASKED, address.get("ask"))) ASKED[address.get("ask")]();
    else read(address);
  }
})();
