"""The texts of the experiments: corpus, tokenizer and token streams, made once and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from knnext.corpus import take_documents
from knnext.devices import checked_device
from knnext.experiments.lab.cache import Cache, settings_key
from knnext.experiments.lab.presets import Preset
from knnext.progress import format_duration
from knnext.say import to_log

if TYPE_CHECKING:
    from knnext.corpus import Corpus, TokenizedDocuments


class TextLab:
    """The texts of one folder and preset, and how long each step of the work took.

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
        say: Callable[[str], None] = to_log,
        device: str | None = None,
    ) -> None:
        self.preset, self.folder, self.say = preset, Path(folder), say
        self.cache = Cache(self.folder / "cache")
        self.device = str(
            checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        )
        self.seconds: dict[str, float] = {}

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
        options = {"model options": dict(p.model_options)} if p.model_options else {}
        return settings | options | self._files

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
        from knnext.lm.load import load_tokenizer
        from knnext.lm.train import train_tokenizer

        if self.preset.model:
            options = self.preset.model_options
            if "tokenizer" in options:
                return load_tokenizer(options["tokenizer"])
            kept = {name: options[name] for name in ("revision", "gguf") if name in options}
            return load_tokenizer(self.preset.model, **kept)

        def make(folder: Path) -> None:
            vocab_size = self.preset.train.vocab_size
            train_tokenizer(self.corpus.train, vocab_size).save_pretrained(folder)

        folder = self.cache.get("tokenizer", self._text_settings, make)
        return load_tokenizer(folder)

    def text(self, split: str) -> TokenizedDocuments:
        """The stream of a split: whole `"train"` for training, `"store"` for the datastore (its
        documents up to `preset.entries` tokens), `"valid"` and `"test"` by heads of documents."""
        return load_text(self.text_file(split))

    def text_file(self, split: str) -> Path:
        """Where the stream of a split is kept, for `load_text`."""
        p = self.preset
        wanted = {"train": None, "store": p.entries, "valid": p.valid_tokens, "test": p.test_tokens}
        if split not in wanted:
            raise ValueError(f"split must be one of {tuple(wanted)}, got {split!r}")
        most = None if split in ("train", "store") else p.document_tokens
        settings = {**self._text_settings, "split": split, "tokens": wanted[split], "most": most}

        def make(folder: Path) -> None:
            with self.step(f"tokenize {split}"):
                save_text(folder / "text.npz", self._tokenize(split, wanted[split], most))

        return self.cache.get("text", settings, make) / "text.npz"

    def _tokenize(self, split: str, wanted: int | None, most: int | None) -> TokenizedDocuments:
        from knnext.corpus import tokenize

        documents = self.corpus.split("train" if split == "store" else split)
        if most is not None and wanted is not None:
            most = max(most, -(-wanted // len(documents)))
        text = tokenize(documents, self.tokenizer, max_tokens=most)
        return text if wanted is None else take_documents(text, wanted + 1)

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

    Of a folder those that a corpus would look at, also by links; not those below `without`
    (results may be written into the folder that is read).
    """
    from knnext.corpus.walk import Skipped, files_below
    from knnext.index.sidecar import file_crc32

    start, apart = Path(path).resolve(), None if without is None else Path(without).resolve()
    files = [(".", start)] if start.is_file() else files_below(start, start, Skipped())
    seen = []
    for name, file in files:
        if apart is None or apart not in file.parents:
            seen.append([name, file.stat().st_size, file_crc32(file)])
    return settings_key({"files": seen})


def save_text(path: Path, text: TokenizedDocuments) -> None:
    """Keep a stream in a file."""
    names = ("tokens", "document_offsets", "num_words", "num_bytes", "hashes")
    found = {name: getattr(text, name) for name in names}
    arrays: dict[str, Any] = {name: array for name, array in found.items() if array is not None}
    np.savez(path, names=np.array(text.names, dtype=np.str_), **arrays)


def load_text(path: Path) -> TokenizedDocuments:
    """What `save_text` kept."""
    from knnext.corpus import TokenizedDocuments

    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    names = arrays.pop("names").tolist()
    return TokenizedDocuments(names=names, **arrays)
