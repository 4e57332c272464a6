"""What the experiments share: a language model, its states, datastores, indexes and searches.

Everything here is made once for its settings, kept on disk (`knnext.experiments.cache`) and shared
by all experiments of a folder. No experiment searches twice to change a temperature or a weight:
`neighbors` keeps what a search found, and temperatures are applied to that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from knnext.demo import faiss_recipe, take_documents
from knnext.experiments import searches
from knnext.experiments.cache import Cache, settings_key
from knnext.experiments.family import Setting
from knnext.experiments.mixture import LogP, Split
from knnext.experiments.presets import Preset
from knnext.perplexity import TextCounts
from knnext.progress import format_duration
from knnext.scores import StreamScores

if TYPE_CHECKING:
    from knnext.corpus import Corpus, TokenizedDocuments
    from knnext.datastore import Datastore
    from knnext.index import FaissIndex

EVALUATED = ("valid", "test")
_LINEAR_TOLERANCE = 0.05  # nats; models in half precision differ by a hundredth


@dataclass(frozen=True)
class LM:
    """A language model and its tokenizer.

    `settings`: plain values that decide it, for cache keys. `seed`: of its training.
    """

    model: Any
    tokenizer: Any
    settings: dict[str, Any]
    seed: int

    @property
    def output_embedding(self) -> Tensor:
        """W_sm, (V, D) float32 on the CPU, without gradient."""
        return self.model.get_output_embeddings().weight.detach().float().cpu()

    @property
    def output_bias(self) -> Tensor | None:
        """(V,) float32 or None."""
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        return None if bias is None else bias.detach().float().cpu()


@dataclass(frozen=True)
class States:
    """The states of one split at one layer: `keys` (n, D) float32, `targets` (n,) int64.

    Row i stands at position i of the split's stream, and its target is the token that followed.
    """

    keys: Tensor
    targets: Tensor


class Lab:
    """The shared artifacts of one folder and preset.

    Args:
        preset: sizes and corpus.
        folder: artifacts go to `cache` below it.
        say: takes lines for people.
        device: where models run and matrices are trained; a GPU where there is one.
    """

    def __init__(
        self,
        preset: Preset,
        folder: str | Path,
        say: Callable[[str], None] = print,
        device: str | None = None,
    ) -> None:
        self.preset, self.folder, self.say = preset, Path(folder), say
        self.cache = Cache(self.folder / "cache")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.seconds: dict[str, float] = {}
        self._lms: dict[int, LM] = {}
        self._splits: dict[tuple[str, str], Split] = {}
        self._indexes: dict[str, Any] = {}

    # Text

    @cached_property
    def corpus(self) -> Corpus:
        """The documents of the three splits."""
        from knnext.corpus import load_corpus

        return load_corpus(self.preset.corpus, max_bytes=self.preset.max_bytes)

    @property
    def _text_settings(self) -> dict[str, Any]:
        p = self.preset
        vocab = None if p.model else p.train.vocab_size
        settings = {"corpus": p.corpus, "max_bytes": p.max_bytes, "model": p.model, "vocab": vocab}
        return settings | self._files

    @cached_property
    def _files(self) -> dict[str, str]:
        """What lies in a corpus or model that is a path now: other files there are other text."""
        corpus, model = self.preset.corpus, self.preset.model
        named = {"corpus files": "" if corpus == "stdlib" else corpus, "model files": model or ""}
        paths = {name: Path(given).expanduser() for name, given in named.items() if given}
        found = {name: path for name, path in paths.items() if path.exists()}
        return {name: files_key(path, self.folder) for name, path in found.items()}

    @cached_property
    def tokenizer(self) -> Any:
        """The given model's, or one trained on the train split."""
        import transformers

        from knnext.train import train_tokenizer

        if self.preset.model:
            return transformers.AutoTokenizer.from_pretrained(self.preset.model)

        def make(folder: Path) -> None:
            vocab_size = self.preset.train.vocab_size
            train_tokenizer(self.corpus.train, vocab_size).save_pretrained(folder)

        folder = self.cache.get("tokenizer", self._text_settings, make)
        return transformers.AutoTokenizer.from_pretrained(folder)

    def text(self, split: str) -> TokenizedDocuments:
        """The stream of a split: whole `"train"` for training, `"store"` for the datastore (its
        documents up to `preset.entries` tokens), `"valid"` and `"test"` by heads of documents."""
        p = self.preset
        wanted = {"train": None, "store": p.entries, "valid": p.valid_tokens, "test": p.test_tokens}
        if split not in wanted:
            raise ValueError(f"split must be one of {tuple(wanted)}, got {split!r}")
        most = None if split in ("train", "store") else p.document_tokens
        settings = {**self._text_settings, "split": split, "tokens": wanted[split], "most": most}

        def make(folder: Path) -> None:
            with self.step(f"tokenize {split}"):
                _save_text(folder / "text.npz", self._tokenize(split, wanted[split], most))

        return _load_text(self.cache.get("text", settings, make) / "text.npz")

    def _tokenize(self, split: str, wanted: int | None, most: int | None) -> TokenizedDocuments:
        from knnext.corpus import tokenize

        documents = self.corpus.split("train" if split == "store" else split)
        if most is not None and wanted is not None:
            most = max(most, -(-wanted // len(documents)))
        text = tokenize(documents, self.tokenizer, max_tokens=most)
        return text if wanted is None else take_documents(text, wanted + 1)

    # Models and states

    def lm(self, seed: int = 0) -> LM:
        """The language model; another seed gives another one of the same shape.

        ValueError where the preset names a finished model and a seed other than 0 is asked for.
        """
        if seed not in self._lms:
            self._lms[seed] = self._given_lm(seed) if self.preset.model else self._trained_lm(seed)
        return self._lms[seed]

    def _given_lm(self, seed: int) -> LM:
        from knnext.train import load_lm

        if seed:
            raise ValueError(
                f"model {self.preset.model} is given as it is: there is none of seed {seed}"
            )
        model, tokenizer = load_lm(str(self.preset.model))
        return LM(model.to(self.device), tokenizer, self._text_settings, 0)

    def _trained_lm(self, seed: int) -> LM:
        from knnext.demo_config import write_json
        from knnext.train import load_lm, save_lm, train_lm

        config = replace(self.preset.train, seed=seed)
        steps = self.preset.train_steps
        settings = {**self._text_settings, "train": asdict(config), "steps": steps}

        def make(folder: Path) -> None:
            with self.step(f"train the language model of seed {seed} for {steps:,} steps"):
                trained = train_lm(
                    self.text("train").tokens,
                    self.tokenizer,
                    config,
                    max_steps=steps,
                    device=self.device,
                )
                save_lm(folder, trained.model, self.tokenizer)
                write_json(
                    folder / "training.json",
                    {
                        "seconds": trained.seconds,
                        "tokens": trained.tokens,
                        "losses": trained.losses,
                    },
                )

        model, _ = load_lm(self.cache.get("lm", settings, make))
        return LM(model.to(self.device), self.tokenizer, settings, seed)

    def states(self, split: str, key_layer: str = "att", lm: LM | None = None) -> States:
        """The states of `"valid"` or `"test"` at a layer, float32 on the CPU."""
        arrays = self._state_arrays(split, key_layer, lm or self.lm())
        return States(arrays["keys"], arrays["targets"])

    def split(self, name: str, lm: LM | None = None) -> Split:
        """Targets, log p_lm and denominators of `"valid"` or `"test"`."""
        lm = lm or self.lm()
        key = (settings_key(lm.settings), name)
        if key not in self._splits:
            arrays = self._state_arrays(name, "att", lm)
            scores = self._scores(name, arrays)
            self._splits[key] = Split(
                name,
                scores.log_p_lm.double(),
                scores.targets,
                scores.document_ids,
                TextCounts.of(scores),
            )
        return self._splits[key]

    def splits(self, lm: LM | None = None) -> tuple[Split, Split]:
        """(valid, test)."""
        return self.split("valid", lm), self.split("test", lm)

    def lm_logits(self, split: str, lm: LM | None = None) -> Tensor:
        """(n, V) float32 logits of the LM, from its `"ffn"` states and output layer; see
        `check_output_layer`."""
        lm = lm or self.lm()
        self.check_output_layer(lm)
        return _logits(self.states(split, "ffn", lm).keys, lm)

    def check_output_layer(self, lm: LM | None = None) -> None:
        """ValueError where the LM's logits are not W h + b: where it scales or caps them."""
        lm = lm or self.lm()
        states, head = self.states("valid", "ffn", lm), slice(0, 256)
        log_p = _logits(states.keys[head], lm).log_softmax(1)
        found = log_p.gather(1, states.targets[head, None]).squeeze(1).double()
        worst = float((found - self.split("valid", lm).log_p_lm[head]).abs().max())
        if worst > _LINEAR_TOLERANCE:
            raise ValueError(
                f"{type(lm.model).__name__} does more with its logits than W h + b (log p differs "
                f"by up to {worst:.2g}), so experiments that need them cannot run on it"
            )

    def _state_arrays(self, split: str, key_layer: str, lm: LM) -> dict[str, Tensor]:
        if split not in EVALUATED:
            raise ValueError(f"split must be one of {EVALUATED}, got {split!r}")
        settings = {
            "lm": lm.settings,
            "text": {**self._text_settings, "split": split, **self._text_sizes},
            "key_layer": key_layer,
            **self._windows,
        }

        def make(folder: Path) -> None:
            from knnext.stream import run_model

            with self.step(f"run the model over {split} ({key_layer})"):
                keys, targets, log_p_lm = run_model(
                    lm.model, self.text(split), key_layer, torch.float32, self._windows
                )
                arrays = {"keys": keys, "targets": targets, "log_p_lm": log_p_lm}
                np.savez(
                    folder / "states.npz",
                    allow_pickle=False,
                    **{n: a.numpy() for n, a in arrays.items()},
                )

        path = self.cache.get("states", settings, make) / "states.npz"
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}

    def _scores(self, split: str, arrays: Mapping[str, Tensor], **found: Tensor) -> StreamScores:
        """Scores of a split without neighbors, or with those found."""
        from knnext.stream import describe_stream

        count = arrays["targets"].shape[0]
        empty: dict[str, Any] = {
            "distances": torch.empty(count, 0),
            "tokens": torch.empty(count, 0, dtype=torch.int32),
        }
        shared = describe_stream(self.text(split), arrays["targets"], arrays["log_p_lm"])
        return StreamScores(**shared, **{**empty, **found})

    @property
    def _windows(self) -> dict[str, Any]:
        p = self.preset
        return {"block_size": p.block_size, "stride": p.stride, "batch_size": p.batch_size}

    @property
    def _text_sizes(self) -> dict[str, Any]:
        p = self.preset
        return {"tokens": [p.valid_tokens, p.test_tokens], "most": p.document_tokens}

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
        settings = self._store_settings(key_layer, lm)
        whole = self.cache.get("datastore", settings, lambda f: self._build(f, key_layer, lm))
        store = Datastore.open(whole / "datastore")
        if metric == store.metric and fraction == 1 and not padding:
            return store
        settings = {**settings, "metric": metric, "fraction": fraction, "padding": padding}

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

    def _store_settings(self, key_layer: str, lm: LM) -> dict[str, Any]:
        return {
            "lm": lm.settings,
            "text": {**self._text_settings, "tokens": self.preset.entries},
            "key_layer": key_layer,
            "stride": self._store_stride(lm),
            "block_size": self.preset.block_size,
        }

    def _store_stride(self, lm: LM) -> int:
        """Each state of the store has seen a quarter of a window at least."""
        from knnext.hidden_states import default_block_size

        return self.preset.stride or max(1, default_block_size(lm.model) * 3 // 4)

    def _build(self, folder: Path, key_layer: str, lm: LM) -> None:
        from knnext.build import build_datastore

        with self.step(f"write the datastore of {key_layer} states"):
            build_datastore(
                lm.model,
                lm.tokenizer,
                self.text("store"),
                folder / "datastore",
                key_layer=key_layer,
                block_size=self.preset.block_size,
                stride=self._store_stride(lm),
                batch_size=self.preset.batch_size,
                corpus=self.preset.corpus,
            )

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

    # Bookkeeping

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Says what is being done, and keeps how long it took."""
        self.say(f"  {name}")
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.say(f"    {format_duration(spent)}")


def files_key(path: str | Path, without: str | Path | None = None) -> str:
    """Stands for a file, or for the files of a folder: their names, sizes and checksums.

    Hidden ones are left out, as from a corpus, and those below `without` (results may be written
    into the folder that is read).
    """
    from knnext.index.sidecar import file_crc32

    start, apart = Path(path).resolve(), None if without is None else Path(without).resolve()
    files = [start] if start.is_file() else sorted(p for p in start.rglob("*") if p.is_file())
    seen = []
    for file in files:
        name = file.relative_to(start)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and (apart is None or apart not in file.parents):
            seen.append([str(name), file.stat().st_size, file_crc32(file)])
    return settings_key({"files": seen})


def _logits(states: Tensor, lm: LM) -> Tensor:
    logits = states @ lm.output_embedding.T
    return logits if lm.output_bias is None else logits + lm.output_bias


def _save_text(path: Path, text: TokenizedDocuments) -> None:
    np.savez(
        path,
        tokens=text.tokens,
        document_offsets=text.document_offsets,
        names=np.array(text.names, dtype=np.str_),
        num_words=text.num_words,
        num_bytes=text.num_bytes,
    )


def _load_text(path: Path) -> TokenizedDocuments:
    from knnext.corpus import TokenizedDocuments

    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    names = arrays.pop("names").tolist()
    return TokenizedDocuments(names=names, **arrays)
