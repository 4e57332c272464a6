"""What the experiments share: a language model, its states, datastores, indexes and searches.

Everything here is made once for its settings, kept on disk (`lab/cache.py`) and shared
by all experiments of a folder. No experiment searches twice to change a temperature or a weight:
`neighbors` keeps what a search found, and temperatures are applied to that.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.evaluation.scores import StreamScores
from knnext.experiments.lab import passes, searches
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.mixture import LogP
from knnext.experiments.lab.models import EVALUATED, LM, ModelLab, States
from knnext.experiments.lab.presets import Preset
from knnext.index.faiss_build import faiss_recipe
from knnext.lm.key_layer import KEY_LAYERS
from knnext.say import to_log

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.index import FaissIndex

__all__ = ["EVALUATED", "LM", "Lab", "States"]


class Lab(ModelLab):
    """The shared artifacts of one folder and preset; for its arguments see `TextLab`."""

    def __init__(
        self,
        preset: Preset,
        folder: str | Path,
        say: Callable[[str], None] = to_log,
        device: str | None = None,
    ) -> None:
        super().__init__(preset, folder, say, device)
        self._indexes: dict[str, Any] = {}

    # Datastores and indexes

    def store(
        self,
        key_layer: str = "att",
        *,
        metric: str = "l2",
        fraction: float = 1.0,
        padding: float = 0.0,
        lm: LM | None = None,
    ) -> Datastore:
        """The datastore of a layer; a nested sample of it; with zero rows at its end.

        Args:
            key_layer: `"att"`, `"ffn"` or a named module.
            metric: what the datastore is declared for; FAISS indexes are built with it. An exact
                search can use either.
            fraction: of the rows, drawn at random with seed 0; smaller samples are subsets.
            padding: zero rows as a share of all rows then, with `padding_token` as value.
            lm: whose states; by default the LM of seed 0.
        """
        from knnext.datastore import Datastore

        lm = lm or self.lm()
        store = self._whole_store(key_layer, lm)
        if metric == store.metric and fraction == 1 and not padding:
            return store
        settings = {
            **self.store_settings(lm),
            "key_layer": key_layer,
            "metric": metric,
            "fraction": fraction,
            "padding": padding,
        }

        def make(folder: Path) -> None:
            with self.step(f"copy {fraction:.3g} of the datastore, {padding:.3g} of it zero rows"):
                searches.copy_store(
                    store.subsample(fraction, 0) if fraction < 1 else store,
                    folder / "datastore",
                    metric=metric,
                    padding=padding,
                    padding_token=self.padding_token,
                )

        return Datastore.open(self.cache.get("datastore", settings, make) / "datastore")

    @property
    def padding_token(self) -> int:
        """The value of zero rows: an id past the vocabulary, never a target, as `<s>` is in the
        paper's store."""
        return int(self.lm().model.get_input_embeddings().weight.shape[0])

    def train_states(self, key_layer: str = "att", lm: LM | None = None) -> States:
        """The rows of the whole datastore as states and targets, keys in their stored dtype."""
        store = self.store(key_layer, lm=lm)
        return States(store.keys[0 : len(store)], store.values[0 : len(store)].long())

    def store_settings(self, lm: LM) -> dict[str, Any]:
        """What decides the rows of the datastores of an LM, but for the layer."""
        return {
            "lm": lm.settings,
            "text": {**self._text_settings, "tokens": self.preset.entries},
            "stride": self._store_stride(lm),
            "block_size": self.preset.block_size,
        }

    def _store_stride(self, lm: LM) -> int:
        """By default each state of the store has seen a quarter of a window at least."""
        from knnext.lm.hidden_states import default_block_size

        p = self.preset
        block = p.block_size or default_block_size(lm.model)
        return p.store_stride or p.stride or max(1, block * 3 // 4)

    def _whole_store(self, key_layer: str, lm: LM) -> Datastore:
        """Of all rows; that of both named layers is made by one run of the LM over the text."""
        from knnext.datastore import Datastore

        both = KEY_LAYERS if key_layer in KEY_LAYERS else (key_layer,)
        settings = {**self.store_settings(lm), "key_layers": list(both)}
        made = self.cache.get("datastores", settings, lambda f: self._build(f, both, lm))
        return Datastore.open(made / searches.layer_folder(key_layer))

    def _build(self, folder: Path, layers: tuple[str, ...], lm: LM) -> None:
        """The datastore of each layer, in a folder of its name."""
        from knnext.datastore.overlap import check_overlap
        from knnext.index import StoredCodes

        with self.step(f"write the datastore of {' and '.join(layers)} states"):
            joined = passes.build_joined(self, folder, layers, lm)
        with self.step("part it by layers"):
            stores = searches.split_store(joined, folder, layers)
        for store in stores:
            StoredCodes.renew(store)
        for split in EVALUATED:
            check_overlap(joined, self.text(split))
        shutil.rmtree(joined.path)

    def build_joined(
        self, folder: Path, layers: tuple[str, ...], lm: LM, **options: Any
    ) -> Datastore:
        """The states of the layers side by side; see `build_datastore` for the options."""
        from knnext.datastore.build import build_datastore

        return build_datastore(
            lm.model,
            lm.tokenizer,
            self.text("store"),
            folder / "joined",
            corpus=self.corpus.facts("train"),
            **self.store_options(layers, lm),
            **options,
        )

    def store_options(self, layers: Sequence[str], lm: LM) -> dict[str, Any]:
        """What of the arguments of `build_datastore` the preset decides, as plain values."""
        return {
            "key_layer": "+".join(layers),
            "block_size": self.preset.block_size,
            "stride": self._store_stride(lm),
            "batch_size": self.preset.batch_size,
        }

    def faiss(
        self,
        store: Datastore,
        factory: str | None = None,
        *,
        train_size: int | None = None,
        seed: int = 1,
    ) -> FaissIndex:
        """The FAISS index of a datastore, by default of the preset's recipe."""
        from knnext.index import FaissIndex

        train_size = train_size or self.preset.train_size
        if factory is None:
            factory = self.preset.factory
        if factory is None:
            factory, train_size = faiss_recipe(store.num_entries, store.dim)
        if train_size is not None:
            train_size = min(train_size, store.num_entries)
        settings = {
            "datastore": store.fingerprint,
            "factory": factory,
            "train_size": train_size,
            "seed": seed,
        }

        def make(folder: Path) -> None:
            with self.step(f"build the FAISS index {factory or ''}".rstrip()):
                FaissIndex.build(store, folder / "index", factory, train_size=train_size, seed=seed)

        path = self.cache.get("faiss", settings, make) / "index"
        if str(path) not in self._indexes:
            self._indexes[str(path)] = FaissIndex.open(path, store, verify=False)
        return self._indexes[str(path)]

    # Searches

    def neighbors(
        self,
        setting: Setting,
        split: str,
        *,
        k: int | None = None,
        nprobe: int | None = None,
        factory: str | None = None,
        train_size: int | None = None,
        keep_indices: bool = False,
        lm: LM | None = None,
    ) -> StreamScores:
        """What the search of a setting finds for a split; made once and kept.

        Args:
            setting: with `w_ds="datastore"`; its temperature plays no part.
            split: `"valid"` or `"test"`.
            k, nprobe, factory, train_size: by default the preset's.
            keep_indices: keep row numbers (8 bytes a neighbor more).
            lm: whose states; by default the LM of seed 0.
        """
        if setting.w_ds != "datastore":
            raise ValueError(f"only a datastore is searched, got w_ds={setting.w_ds!r}")
        lm, k = lm or self.lm(), k or self.preset.k
        faiss = "faiss" in (setting.mask, setting.score)
        store = self.store(
            setting.h_ds,
            metric=setting.metric if faiss else "l2",
            fraction=setting.fraction,
            padding=setting.padding,
            lm=lm,
        )
        settings = {
            "datastore": store.fingerprint,
            "states": {"lm": lm.settings, "split": split, **self._text_sizes, **self._windows},
            "setting": {**setting.to_dict(), "temperature": None},
            "k": k,
            "faiss": [nprobe or self.preset.nprobe, factory or self.preset.factory]
            if faiss
            else [],
            "train_size": train_size or self.preset.train_size if faiss else None,
            "indices": keep_indices,
        }

        def make(folder: Path) -> None:
            index = self.faiss(store, factory, train_size=train_size) if faiss else None
            what = f"{setting.mask} mask, {setting.score} score"
            with self.step(f"search {split} in {len(store):,} rows ({what}, {setting.metric})"):
                arrays = self._state_arrays(split, setting.h_ds, lm)
                start = time.perf_counter()
                distances, indices = searches.search(
                    store,
                    arrays["keys"],
                    k,
                    setting,
                    index,
                    nprobe or self.preset.nprobe,
                    self.device,
                )
                found = {"distances": distances, "tokens": searches.tokens_of(store, indices)}
                if keep_indices:
                    found["indices"] = indices
                scores = self._scores(split, arrays, **found)
                scores.seconds = {"search": time.perf_counter() - start}
                scores.save(folder / "scores.npz")

        return StreamScores.load(self.cache.get("neighbors", settings, make) / "scores.npz")

    def component(self, setting: Setting, lm: LM | None = None, **options: Any) -> LogP:
        """log p_knn of every target by split and temperature; see `neighbors` for the options."""
        found = {name: self.neighbors(setting, name, lm=lm, **options) for name in EVALUATED}
        return lambda name, temperature: found[name].log_p_knn(temperature)
