"""The whole road in one command: a small LM or a finished one, its states, help by neighbors.

Every step leaves its result in the folder, and a second run takes up what is there. Settings are
written down first: a folder made with others is refused, never mixed. Temperature and lmbda are
fitted on the validation split for each system on its own; the test split is scored once, at the
end, and its figures are kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.demo.config import EXACT, FAISS, RESCORED, DemoConfig, claim
from knnext.demo.pretrained import SMOLLM2, save_smollm2
from knnext.lm.hidden_states import default_block_size
from knnext.lm.train import TrainConfig
from knnext.output import check_outputs, write_json
from knnext.progress import format_duration
from knnext.say import Say, to_log

if TYPE_CHECKING:
    from knnext.corpus import Corpus, Document, TokenizedDocuments
    from knnext.datastore import Datastore
    from knnext.evaluation.continuation import Continuation
    from knnext.evaluation.scores import StreamScores
    from knnext.evaluation.tune import TuneResult
    from knnext.index import FaissIndex
    from knnext.index.base import Index


def run_demo(
    config: DemoConfig, out: str | Path, *, fresh: bool = False, say: Say = to_log
) -> dict[str, Any]:
    """Run what is missing in the folder `out` and return what `results.json` there holds.

    Args:
        config: see `DemoConfig`.
        out: the folder; made where it does not exist.
        fresh: remove what an earlier demo left there, and nothing else, before the start.
        say: takes each line for people.
    """
    out = Path(out)
    claim(out, config, fresh)
    return Demo(config, out, say).run()


class Demo:
    """One demo in one folder."""

    def __init__(self, config: DemoConfig, out: Path, say: Say) -> None:
        self.config, self.out, self.say = config, out, say
        self.seconds: dict[str, float] = {}
        self._steps = 0

    # The steps

    def run(self) -> dict[str, Any]:
        """All steps in order; those whose result is there are passed over."""
        from knnext.demo.results import finish, plan_lines, result_lines

        done = self.out / "results.json"
        again = done.exists()
        if again:
            results: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
            self.say(f"{self.out} holds the finished demo; --fresh runs it again.\n")
        else:
            check_outputs(done, *(self.out / name for name in ("report.html", "tuning.png")))
            corpus = self._corpus()
            for line in plan_lines(self.config, corpus.describe(), self.out):
                self.say(line)
            made = self._work(corpus)
            with self.step("evaluate the test split, write the report"):
                results = finish(self.out, self.config, self.seconds, *made)
            self.seconds["all of this run"] = sum(self.seconds.values())
            results["seconds"] = self.seconds
            write_json(done, results)
        for line in result_lines(results, self.out, again=again):
            self.say(line)
        return results

    def _work(self, corpus: Corpus) -> tuple[Any, ...]:
        from knnext.index import StoredCodes

        model, tokenizer = self._model(corpus)
        store = self._datastore(model, tokenizer, corpus)
        with self.step("encode the keys, eight bits a number, for the exact search"):
            StoredCodes.renew(store)
        index = self._index(store)
        config = self.config
        valid = self._text("valid", corpus.valid, tokenizer, config.valid_tokens)
        tuned = self._tune(self._score("valid", model, store, index, valid, keep_indices=False))
        self._keep_fit(tuned[EXACT])
        test = self._text("test", corpus.test, tokenizer, config.test_tokens)
        scores = self._score("test", model, store, index, test, keep_indices=True)
        written = self._continued(model, tokenizer, store, test, tuned[EXACT])
        return corpus, model, tokenizer, store, index, tuned, test, scores, written

    def _corpus(self) -> Corpus:
        from knnext.corpus import load_corpus

        config = self.config
        with self.step("read the corpus", quiet=True):
            return load_corpus(config.corpus, max_bytes=config.max_bytes, seed=config.seed)

    def _model(self, corpus: Corpus) -> tuple[Any, Any]:
        """The model and its tokenizer, read back from disk in any case."""
        from knnext.lm.load import load_lm

        if self.config.model is not None:
            with self.step("read the finished language model"):
                return load_lm(self._finished_model(self.config.model), device=_device())
        folder = self.out / "model"
        if not (self.out / "training.json").exists():
            with self.step(f"train the language model for {self.config.train_seconds:.0f} s"):
                self._train(corpus, folder)
                return load_lm(folder, device=_device())
        with self.step("read the trained language model"):
            return load_lm(folder, device=_device())

    def _finished_model(self, name: str) -> str:
        if name != SMOLLM2:
            return name
        folder = self.out / "model"
        if not folder.exists():
            save_smollm2(folder)
        return str(folder)

    def _train(self, corpus: Corpus, folder: Path) -> None:
        from knnext.corpus import tokenize
        from knnext.lm.load import save_lm
        from knnext.lm.train import train_lm, train_tokenizer

        config = TrainConfig(seed=self.config.seed)
        tokenizer = train_tokenizer(corpus.train, config.vocab_size)
        tokens = tokenize(corpus.train, tokenizer).tokens
        trained = train_lm(tokens, tokenizer, config, seconds=self.config.train_seconds)
        save_lm(folder, trained.model, tokenizer)
        last = trained.losses[-max(1, len(trained.losses) // 20) :]
        facts = {
            "parameters": sum(p.numel() for p in trained.model.parameters()),
            "corpus_tokens": len(tokens),
            "steps": trained.steps,
            "tokens": trained.tokens,
            "seconds": trained.seconds,
            "loss": sum(last) / len(last),
            "config": asdict(config),
        }
        write_json(self.out / "training.json", facts)

    def _datastore(self, model: Any, tokenizer: Any, corpus: Corpus) -> Datastore:
        from knnext.corpus import take_documents, tokenize
        from knnext.datastore.build import build_datastore

        with self.step("write the datastore"):
            tokens = take_documents(tokenize(corpus.train, tokenizer), self.config.entries + 1)
            return build_datastore(
                model,
                tokenizer,
                tokens,
                self.out / "datastore",
                **self._windows(model),
                corpus=corpus.facts("train"),
            )

    def _windows(self, model: Any) -> dict[str, Any]:
        """Of the datastore: a state has seen a quarter of a window of the small LM, an eighth of
        one of the finished; half of one, as where a text is scored, costs half as much more."""
        if self.config.model is None:
            return {"stride": TrainConfig().block_size * 3 // 4, "batch_size": 32}
        block = min(512, default_block_size(model))
        return {"block_size": block, "stride": max(1, block * 7 // 8), "batch_size": 4}

    def _index(self, store: Datastore) -> FaissIndex:
        from knnext.index import FaissIndex
        from knnext.index.faiss_build import faiss_recipe

        factory, train_size = faiss_recipe(store.num_entries, store.dim)
        with self.step(f"build the FAISS index {factory or ''}".rstrip()):
            return FaissIndex.build(
                store, self.out / "datastore.index", factory, train_size=train_size
            )

    def _text(
        self, name: str, documents: Sequence[Document], tokenizer: Any, wanted: int
    ) -> TokenizedDocuments:
        """About `wanted` tokens, at most so many of one document, of documents in hash order."""
        from knnext.corpus import take_documents, tokenize

        most = max(self.config.document_tokens, math.ceil(wanted / len(documents)))
        text = take_documents(tokenize(documents, tokenizer, max_tokens=most), wanted + 1)
        self.say(f"        {name}: {len(text) - 1:,} tokens of {text.num_documents:,} documents")
        return text

    def _score(
        self,
        name: str,
        model: Any,
        store: Datastore,
        index: FaissIndex,
        text: TokenizedDocuments,
        *,
        keep_indices: bool,
    ) -> dict[str, StreamScores]:
        from knnext.evaluation import search_stream
        from knnext.index import ExactIndex, FaissIndex

        indexes: dict[str, Index] = {
            EXACT: ExactIndex(store, device=_device()),
            FAISS: index,
            RESCORED: FaissIndex.open(index.path, store, rescore=True),
        }
        with self.step(f"search the {name} split three ways"):
            windows = {**self._windows(model), "stride": None}
            return search_stream(
                model, indexes, text, k=self.config.k, keep_indices=keep_indices, **windows
            )

    def _tune(self, scores: Mapping[str, StreamScores]) -> dict[str, TuneResult]:
        from knnext.evaluation.tune import tune
        from knnext.evaluation.tuning_file import edge_notes

        with self.step("tune temperature and lmbda on valid, for each system"):
            tuned = {name: tune(one) for name, one in scores.items()}
        for name, one in tuned.items():
            for line in edge_notes(one):
                self.say(f"        {name}: {line}")
        return tuned

    def _continued(
        self,
        model: Any,
        tokenizer: Any,
        store: Datastore,
        text: TokenizedDocuments,
        tuned: TuneResult,
    ) -> list[Continuation]:
        from knnext.evaluation.continuation import continuations
        from knnext.index import ExactIndex

        index = ExactIndex(store, device=_device())
        with self.step("continue test documents, without and with neighbors"):
            return list(
                continuations(
                    model,
                    index,
                    tokenizer,
                    text,
                    k=self.config.k,
                    temperature=tuned.temperature,
                    lmbda=tuned.lmbda,
                )
            )

    def _keep_fit(self, exact: TuneResult) -> None:
        """Where `knnext generate` and the others look for it."""
        from knnext.evaluation.tuning_file import tuning_path, write_tuning

        path = tuning_path(self.out / "datastore")
        path.unlink(missing_ok=True)  # of a run that was broken off
        search = {"k": self.config.k, "index": "exact", "nprobe": None, "rescore": False}
        write_tuning(path, exact, search)

    @contextmanager
    def step(self, name: str, *, quiet: bool = False) -> Iterator[None]:
        """Times a step and says what is being done."""
        if not quiet:
            self._steps += 1
            self.say(f"  [{self._steps}/{NUM_STEPS}] {name}")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        if not quiet:
            self.say(f"        {format_duration(self.seconds[name])}")


NUM_STEPS = 9


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
