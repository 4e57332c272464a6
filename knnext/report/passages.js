// The figures of a text's tokens: log p by the base LM, by the neighbors, and by the mixture at any
// setting. Nothing here knows the page.
"use strict";
const knnextPassages = (() => {
  const NO_TOKEN = 65535; // of a padded place
  const log = (x) => (x === null ? -Infinity : x); // JSON has no infinity

  // log((1 - lmbda) p_lm + lmbda p_knn); the base alone where there are no neighbors.
  function mixed(lm, knn, lmbda, found) {
    if (!found || lmbda === 0) return lm;
    const a = lmbda === 1 ? -Infinity : Math.log1p(-lmbda) + lm, b = Math.log(lmbda) + knn;
    const most = Math.max(a, b);
    return most === -Infinity ? most : most + Math.log(Math.exp(a - most) + Math.exp(b - most));
  }

  function bytes(base64, Kind) {
    const text = atob(base64), raw = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) raw[i] = text.charCodeAt(i);
    return new Kind(raw.buffer);
  }

  // An excerpt of a report: what several systems found, at the temperature and k they were tuned to.
  class Kept {
    constructor(data, raw) {
      Object.assign(this, { data, raw, name: raw.name, first: raw.first, cut: raw.cut, texts: raw.texts, copied: raw.copied, start: raw.start });
      this.remixable = false;
    }
    get length() { return this.texts.length; }
    word(id) { return this.data.vocab[id]; }
    target(i) { return this.raw.targets[i]; }
    lm(i) { return log(this.raw.lm[i]); }
    found(i, s) { return this.raw.systems[s].near[i].length > 0; }
    knn(i, s) { return log(this.raw.systems[s].knn[i]); }
    mix(i, s, { lmbda }) { return mixed(this.lm(i), this.knn(i, s), lmbda, this.found(i, s)); }
    top(i, s) {
      const votes = this.raw.systems[s].votes[i], rows = [];
      for (let j = 0; j < votes.length; j += 2) rows.push({ id: votes[j], knn: votes[j + 1] });
      return rows;
    }
    neighbors(i, s) {
      const near = this.raw.systems[s].near[i], rows = [];
      for (let j = 0; j < near.length; j += 3)
        rows.push({ row: near[j], id: this.data.spans[near[j]][1], distance: near[j + 1], share: near[j + 2] });
      return rows;
    }
    spans(rows) {
      return rows.map((row) => {
        const [before, id, after, document] = this.data.spans[row];
        return { before, token: this.word(id), after, document: this.data.documents[document] };
      });
    }
  }

  // Tokens with all that was found for them: k distances, and every token that a neighbor or the
  // base LM would give ("candidates"), so that any setting can be mixed here.
  class Whole {
    constructor(raw, fetchSpans) {
      Object.assign(this, { raw, name: raw.name, first: 0, cut: raw.cut, texts: raw.texts, copied: raw.copied, start: raw.start });
      this.k = raw.k;
      this.distances = bytes(raw.distances, Float32Array);
      this.places = bytes(raw.places, Uint16Array);
      this.starts = bytes(raw.starts, Int32Array);
      this.ids = bytes(raw.ids, Int32Array);
      this.logP = bytes(raw.log_p, Float32Array);
      this.targets = bytes(raw.target_places, Uint16Array);
      this.spans = fetchSpans;
      this.remixable = true;
    }
    get length() { return this.texts.length; }
    word(id) { return this.raw.vocab[id]; }
    target(i) { return this.ids[this.starts[i] + this.targets[i]]; }
    lm(i) { return this.logP[this.starts[i] + this.targets[i]]; }
    found(i) { return this.places[i * this.k] !== NO_TOKEN; }
    // exp of the scores, shifted by the nearest's, so that none of them overflows.
    weight(at, first, temperature) { return Math.exp((this.distances[first] - this.distances[at]) / temperature); }
    knn(i, _, { temperature, k }) {
      const first = i * this.k, target = this.targets[i];
      let all = 0, own = 0, nearest = -1; // of those with the target, which may all be far away
      for (let at = first; at < first + k && this.places[at] !== NO_TOKEN; at++) {
        all += this.weight(at, first, temperature);
        if (this.places[at] !== target) continue;
        if (nearest < 0) nearest = at;
        own += this.weight(at, nearest, temperature);
      }
      if (nearest < 0) return -Infinity;
      return (this.distances[first] - this.distances[nearest]) / temperature + Math.log(own / all);
    }
    mix(i, s, settings) { return mixed(this.lm(i), this.knn(i, s, settings), settings.lmbda, this.found(i)); }
    // The likeliest tokens of the mixture and of the base, and the target; all three p of each.
    top(i, s, { temperature, lmbda, k }, count = 8) {
      const start = this.starts[i], size = this.starts[i + 1] - start, first = i * this.k;
      const masses = new Float64Array(size);
      let all = 0;
      for (let at = first; at < first + k && this.places[at] !== NO_TOKEN; at++) {
        const weight = this.weight(at, first, temperature);
        masses[this.places[at]] += weight;
        all += weight;
      }
      const share = all > 0 ? lmbda : 0, rows = [];
      for (let place = 0; place < size; place++) {
        const lm = Math.exp(this.logP[start + place]), knn = all > 0 ? masses[place] / all : 0;
        rows.push({ id: this.ids[start + place], place, lm, knn, mix: (1 - share) * lm + share * knn });
      }
      rows.sort((a, b) => b.mix - a.mix || a.place - b.place);
      const base = rows.reduce((best, row) => (row.lm > best.lm ? row : best));
      const shown = rows.slice(0, count);
      for (const wanted of [base, rows.find((row) => row.place === this.targets[i])])
        if (!shown.includes(wanted)) shown.push(wanted);
      return shown;
    }
    neighbors(i, s, { temperature, k }) {
      const first = i * this.k, rows = this.raw.rows[i];
      let all = 0;
      for (let at = first; at < first + k && this.places[at] !== NO_TOKEN; at++) all += this.weight(at, first, temperature);
      return rows.slice(0, k).map((row, j) => ({
        row, id: this.ids[this.starts[i] + this.places[first + j]],
        distance: this.distances[first + j], share: this.weight(first + j, first, temperature) / all,
      }));
    }
  }

  // A text that is being written, a token at a time.
  class Grown {
    constructor(name) {
      Object.assign(this, { name, first: 0, cut: [true, false], texts: [], copied: [], parts: [], start: 0, remixable: true });
    }
    push(part) {
      this.parts.push(part);
      this.texts.push(...part.texts);
      this.copied.push(...part.copied);
    }
    get length() { return this.parts.length; }
    word(id) { return id.part.word(id.id); }
    owned(i, row) { return { ...row, id: { part: this.parts[i], id: row.id, key: row.id } }; }
    target(i) { return { part: this.parts[i], id: this.parts[i].target(0), key: this.parts[i].target(0) }; }
    lm(i) { return this.parts[i].lm(0); }
    found(i) { return this.parts[i].found(0); }
    knn(i, s, settings) { return this.parts[i].knn(0, s, settings); }
    mix(i, s, settings) { return this.parts[i].mix(0, s, settings); }
    top(i, s, settings, count) { return this.parts[i].top(0, s, settings, count).map((row) => this.owned(i, row)); }
    neighbors(i, s, settings) { return this.parts[i].neighbors(0, s, settings).map((row) => this.owned(i, row)); }
    spans(rows) { return this.parts[0].spans(rows); }
  }

  // Two tokens of one place are one: their ids are numbers, or of one part.
  const same = (a, b) => (a?.key ?? a) === (b?.key ?? b);
  const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
  const perplexity = (logs) => Math.exp(-mean(logs));

  return { Kept, Whole, Grown, same, mean, perplexity };
})();
