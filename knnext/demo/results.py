"""What the demo says at its start and shows at its end."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from knnext.demo.config import EXACT, FAISS, RESCORED, WORDS, DemoConfig
from knnext.demo.pretrained import SMOLLM2
from knnext.evaluation import Evaluation, evaluate
from knnext.evaluation.scores import StreamScores
from knnext.evaluation.spans import excerpt_head, neighbor_spans
from knnext.evaluation.tune import TuneResult
from knnext.progress import format_duration
from knnext.report import Report, Row, Surface, format_bytes, text_table, write_report
from knnext.report.continuations import Shown, in_words
from knnext.report.explorer import System, explorer_data
from knnext.report.rows import table_rows
from knnext.say import shown

if TYPE_CHECKING:
    from knnext.corpus import Corpus, TokenizedDocuments
    from knnext.datastore import Datastore
    from knnext.evaluation.continuation import Continuation
    from knnext.index import FaissIndex

_SAMPLES = 5
_SAMPLE_CONTEXT = 14  # tokens


def plan_lines(config: DemoConfig, corpus: str, out: Path) -> list[str]:
    """What will be done, before it is."""
    device = "the GPU" if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    small = config.model is None
    model = f"GPT-2 of 3 layers, dim 128, trained for {config.train_seconds:.0f} s on {device}"
    return [
        f"knnext demo: a {'small' if small else 'finished'} language model, and what the neighbors "
        "of its states add to it",
        "",
        f"  corpus     {corpus}",
        f"  model      {model if small else f'{model_name(config)}, as it is, on {device}'}",
        f"  datastore  at most {config.entries:,} entries: a state of the model and the token that "
        "followed",
        f"  search     the {config.k:,} nearest of them, exactly and with FAISS",
        "  tuning     temperature and lmbda on the validation split, for each system on its own",
        "  report     perplexity on the test split, which is scored once",
        f"  folder     {out}; run again, it goes on where it stopped",
        "",
    ]


def model_name(config: DemoConfig) -> str:
    """Of a finished model, for people."""
    return "SmolLM2-135M-Instruct" if config.model == SMOLLM2 else str(config.model)


def finish(
    out: Path,
    config: DemoConfig,
    seconds: Mapping[str, float],
    corpus: Corpus,
    model: Any,
    tokenizer: Any,
    store: Datastore,
    index: FaissIndex,
    tuned: dict[str, TuneResult],
    test: TokenizedDocuments,
    scores: dict[str, StreamScores],
    written: Sequence[Continuation],
) -> dict[str, Any]:
    """Evaluate the test split, write the pictures and the report, and return all figures."""
    evaluations = {
        name: evaluate(scores[name], one.temperature, one.lmbda) for name, one in tuned.items()
    }
    rows = table_rows(evaluations, _sizes(model, store, index), WORDS)
    samples = best_samples(scores[EXACT], tuned[EXACT], test, store, tokenizer)
    facts = {
        "corpus": corpus.describe(),
        **_model_facts(out, config, model),
        **_facts(config, seconds, store, index, evaluations[EXACT]),
    }
    systems = [
        System(name, scores[name], one.temperature, one.lmbda, WORDS[name])
        for name, one in tuned.items()
    ]
    explorer = explorer_data(systems, store, tokenizer)
    continued = in_words(written, store, tokenizer)
    _write_report(out, rows, tuned[EXACT], facts, explorer, continued)
    picture = _write_picture(out, tuned[EXACT])
    return {
        "config": asdict(config),
        "rows": [asdict(row) for row in rows],
        "samples": samples,
        "continuations": [asdict(one) for one in continued],
        "facts": facts,
        "evaluations": {name: one.to_dict() for name, one in evaluations.items()},
        "tuning": {name: one.to_dict() for name, one in tuned.items()},
        "files": ["report.html", *picture, "results.json"],
    }


def result_lines(results: Mapping[str, Any], out: Path, *, again: bool = False) -> list[str]:
    """The table, some tokens, where to look and what to try, for a terminal.

    `again`: the results are of an earlier run.
    """
    rows = [Row(**row) for row in results["rows"]]
    lines = ["", text_table(rows), "", _NOTE, "", "Where the neighbors helped most:"]
    for sample in results["samples"]:
        chance = f"{sample['p_lm']:.2g} -> {sample['p']:.2g}"
        lines += [
            "",
            f"  {_tail(sample['before'])} [{shown(sample['token'])}]   {chance}",
            f"      text      {sample['document']}",
            f"      neighbor  {_tail(sample['neighbor_before'])} "
            f"[{shown(sample['neighbor_token'])}]   distance {sample['distance']:.3g}",
            f"                {sample['neighbor_document']}",
        ]
    total = format_duration(results["seconds"]["all of this run"])
    lines += ["", f"The run that made them took {total}." if again else f"Done in {total}."]
    width = max(map(len, results["files"]))
    notes = {"report.html": "open it in a browser: the table, the surface, every token explained"}
    lines += [
        f"  {out / name!s:{len(str(out)) + 1 + width}}  {notes.get(name, '')}".rstrip()
        for name in results["files"]
    ]
    finished = results["config"].get("model")
    commands = next_commands(out, None if finished == SMOLLM2 else finished)
    return [*lines, "", "To try next:", *(f"  {line}" for line in commands)]


def next_commands(out: Path, model_folder: str | None = None) -> list[str]:
    """Three commands on the demo's model and datastore, as this shell can run them."""
    command = ["knnext"] if shutil.which("knnext") else [_shorter(sys.executable), "-m", "knnext"]
    store, model = str(out / "datastore"), ["--model", model_folder or str(out / "model")]
    tries = (
        ["search", store, "def __init__(self", *model, "--k", "5"],
        ["generate", store, "def __init__(self", *model, "--max-new-tokens", "40"],
        ["eval", store, *model, "--index", "faiss", "--document-tokens", "50"],
    )
    return [shlex.join([*command, *words]) for words in tries]


def _shorter(path: str) -> str:
    """Relative to the working directory, where it lies below."""
    return path.removeprefix(str(Path.cwd()) + os.sep)


_NOTE = (
    "Perplexity per token of the test split with 95 % intervals (bootstrap over documents; paired "
    "for the\nchange against the base). Tokens/s of model, search and mixing together. On disk: "
    "what is searched,\nand for the base its weights."
)


def best_samples(
    scores: StreamScores,
    tuned: TuneResult,
    text: TokenizedDocuments,
    store: Datastore,
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """The largest gains, one a document and target, with the nearest neighbor of that target."""
    assert scores.indices is not None
    log_p = scores.log_p(tuned.temperature, tuned.lmbda)
    gain = log_p - scores.log_p_lm.double()
    seen: set[Any] = set()
    samples: list[dict[str, Any]] = []
    for position in gain.argsort(descending=True).tolist():
        # Without a gain no neighbor need have the target.
        if len(samples) == _SAMPLES or gain[position] <= 0:
            break
        document, target = int(scores.document_ids[position]), int(scores.targets[position])
        word = tokenizer.decode([target])
        # A mark or a piece of a word says little to a reader, however well it was foreseen.
        if {document, word} & seen or not _is_word(word) or scores.ends_document[position]:
            continue
        seen |= {document, word}
        rank = int((scores.tokens[position] == target).nonzero()[0])
        row = scores.indices[position, rank : rank + 1]
        (span,) = neighbor_spans(store, tokenizer, row, before=_SAMPLE_CONTEXT, after=0)
        start = max(int(text.document_offsets[document]) + 1, position + 1 - _SAMPLE_CONTEXT)
        samples.append(
            {
                "before": excerpt_head(
                    tokenizer.decode(text.tokens[start : position + 1].tolist()),
                    start > int(text.document_offsets[document]) + 1,
                ),
                "token": word,
                "document": scores.document_names[document],
                "p_lm": float(scores.log_p_lm[position].exp()),
                "p": float(log_p[position].exp()),
                "neighbor_before": span.excerpt[0],
                "neighbor_token": span.token,
                "neighbor_document": span.document,
                "distance": float(scores.distances[position, rank]),
            }
        )
    return samples


def _is_word(text: str) -> bool:
    return text.startswith(" ") and text[1:].isalpha() and len(text) > 3


def _write_report(
    out: Path,
    rows: list[Row],
    tuned: TuneResult,
    facts: dict[str, str],
    explorer: Any,
    continued: Sequence[Shown],
) -> None:
    lead = (
        f"A language model, mixed with the {facts['neighbors per token']} nearest of "
        f"{facts['datastore'].split(' of ')[0]} stored states. Nothing was trained for the mixture "
        "but two numbers, fitted on the validation split."
    )
    write_report(
        out / "report.html",
        Report(
            title(rows[0], rows[1]),
            lead,
            rows,
            _NOTE.replace("\n", " "),
            surface_of(tuned, EXACT),
            facts,
            explorer,
            continued,
        ),
    )


def title(base: Row, mixed: Row) -> str:
    """The finding in one line, no stronger than its interval."""
    change, interval = mixed.change, mixed.change_interval
    assert change is not None
    for digits in (0 if base.perplexity >= 100 else 1, 2, 3):
        before, after = (f"{row.perplexity:,.{digits}f}" for row in (base, mixed))
        if before != after:
            break
    if interval is not None and (interval[1] < 0 or interval[0] > 0):
        verb = "take" if change < 0 else "bring"
        return f"Neighbors {verb} test perplexity from {before} to {after}"
    return (
        "Whether neighbors change test perplexity is not certain here: "
        f"{before} without them, {after} with them"
    )


def surface_of(tuned: TuneResult, name: str) -> Surface:
    """The grid as the report wants it."""
    return Surface(
        tuned.temperatures.tolist(),
        tuned.lmbdas.tolist(),
        torch.from_numpy(tuned.surface).exp().tolist(),
        (tuned.temperature, tuned.lmbda, tuned.perplexity),
        tuned.base_perplexity,
        name,
    )


def _write_picture(out: Path, tuned: TuneResult) -> list[str]:
    from knnext.report.plots import plot_surface

    plot_surface(tuned, out / "tuning.png", title=f"{EXACT}, validation split")
    return ["tuning.png"]


def _sizes(model: Any, store: Datastore, index: FaissIndex) -> dict[str, int]:
    """Bytes of what each system reads."""
    from knnext.index import StoredCodes

    keys = sum(shard.keys.num_bytes for shard in store.meta.shards)
    values = sum(shard.values.num_bytes for shard in store.meta.shards)
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    codes = StoredCodes.open(store, verify=False).nbytes
    return {
        "base LM": weights,
        EXACT: keys + codes + values,
        FAISS: index.num_bytes + values,
        RESCORED: index.num_bytes + keys + values,
    }


def _model_facts(out: Path, config: DemoConfig, model: Any) -> dict[str, str]:
    if config.model is not None:
        shape = model.config
        count = sum(p.numel() for p in model.parameters())
        return {
            "model": f"{model_name(config)}, {shape.num_hidden_layers} layers, dim "
            f"{shape.hidden_size}, vocabulary {shape.vocab_size:,}, {count / 1e6:.1f} M parameters",
            "training": "none here: it is used as it is",
        }
    training = json.loads((out / "training.json").read_text(encoding="utf-8"))
    shape = training["config"]
    return {
        "model": f"GPT-2, {shape['num_layers']} layers, dim {shape['dim']}, context "
        f"{shape['block_size']}, vocabulary {shape['vocab_size']:,}, "
        f"{training['parameters'] / 1e6:.1f} M parameters",
        "training": f"{training['steps']:,} steps, {training['tokens'] / 1e6:.1f} M tokens in "
        f"{format_duration(training['seconds'])}; last loss {training['loss']:.2f}",
    }


def _facts(
    config: DemoConfig,
    seconds: Mapping[str, float],
    store: Datastore,
    index: FaissIndex,
    test: Evaluation,
) -> dict[str, str]:
    threads = torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads != 1)} of {os.cpu_count()}, {platform.machine()}"
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    return {
        "datastore": f"{store.num_entries:,} of the train split's tokens, "
        f"{store.num_documents:,} documents, keys {store.key_layer!r}, float16 x {store.dim}",
        "FAISS index": f"{index.factory}, nprobe {index.nprobe}, {format_bytes(index.num_bytes)}",
        "neighbors per token": f"{config.k:,}",
        "test split": f"{test.num_tokens:,} tokens of {test.num_documents:,} documents, at most "
        f"{config.document_tokens} of one where there are enough",
        "target among the neighbors": f"{100 * test.target_found:.1f} % of the test tokens",
        "machine": where,
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
        "time": ", ".join(
            f"{name.replace('lmbda', 'λ')} {format_duration(s)}" for name, s in seconds.items()
        ),
    }


def _tail(text: str, width: int = 56) -> str:
    text = shown(text)
    return "…" + text[-width:] if len(text) > width else text
