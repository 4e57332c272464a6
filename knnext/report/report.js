// The report's own part: its excerpts into the explorer.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  if (!data.excerpts.length) return void (document.getElementById("explorer").hidden = true);
  knnextExplorer.start(data.systems.map((system) => ({ ...system, k: data.k })));
  knnextExplorer.show(data.excerpts.map((raw) => {
    const of = new knnextPassages.Kept(data, raw), end = raw.first + raw.targets.length;
    of.note = `Tokens ${raw.first + 1} to ${end} of ${raw.name}. λ can be moved here; temperature and k in knnext explore, ` +
      "which has all the neighbors at hand.";
    return { name: raw.name, passages: [of] };
  }));
})();
