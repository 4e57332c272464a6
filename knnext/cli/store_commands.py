"""The commands that make, change, carry and describe a datastore, with their options."""

from __future__ import annotations

import argparse
from typing import Any

from knnext.cli.arguments import (
    add_corpus,
    add_datastore,
    add_index_path,
    add_key_dtype,
    add_model,
    add_parts,
    add_windows,
    new_command,
    num_bytes,
    positive,
    refuse_dtype,
    seed,
)
from knnext.cli.distill_arguments import add_distill_options
from knnext.cli.hub_arguments import add_pull_options, add_push_options


def add_build_command(commands: Any) -> argparse.ArgumentParser:
    text = "write the datastore of a model and a corpus; goes on with one that was interrupted"
    c = new_command(commands, "build", "knnext.cli.build:build", text)
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


def add_join_command(commands: Any) -> argparse.ArgumentParser:
    text = "join what was built by build --part and index --part, without copying rows"
    c = new_command(commands, "join", "knnext.cli.join:join", text)
    add_datastore(c)
    add_index_path(c)
    return c


def add_index_command(commands: Any) -> argparse.ArgumentParser:
    text = "build the index of a datastore; goes on with one that was interrupted"
    c = new_command(commands, "index", "knnext.cli.build:index", text)
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


def add_info_command(commands: Any) -> argparse.ArgumentParser:
    text = "what a datastore holds"
    c = new_command(commands, "info", "knnext.cli.build:info", text)
    add_datastore(c)
    c.add_argument("--verify", action="store_true", help="read every byte and compare checksums")
    return c


def add_import_command(commands: Any) -> argparse.ArgumentParser:
    text = "bring in the datastore of another kNN-LM program"
    c = new_command(commands, "import", "knnext.cli.build:import_legacy", text)
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


def add_export_command(commands: Any) -> argparse.ArgumentParser:
    text = "write the rows of a datastore for other programs"
    c = new_command(commands, "export", "knnext.cli.export:export", text)
    add_datastore(c)
    c.add_argument("out", metavar="FOLDER", help="a new folder")
    c.add_argument(
        "--format",
        choices=("npy", "safetensors", "parquet"),
        required=True,
        help="bfloat16 keys stay so in safetensors, and are float32 in the others",
    )
    return c


def add_delete_command(commands: Any) -> argparse.ArgumentParser:
    text = "let no search find some documents any more"
    c = new_command(commands, "delete", "knnext.cli.delete:delete", text)
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


def add_compact_command(commands: Any) -> argparse.ArgumentParser:
    text = "take what was deleted off the disk: rows, codes, and the FAISS index"
    c = new_command(commands, "compact", "knnext.cli.delete:compact", text)
    add_datastore(c)
    c.add_argument(
        "--drop-index", action="store_true", help="remove the FAISS index, and build no new one"
    )
    return c


def add_distill_command(commands: Any) -> argparse.ArgumentParser:
    text = "write what the neighbors say of every token of a text, to train another model on"
    c = new_command(commands, "distill", "knnext.cli.distill:distill", text)
    add_distill_options(c)
    return c


def add_push_command(commands: Any) -> argparse.ArgumentParser:
    text = "send a datastore to the Hugging Face Hub, in one commit"
    c = new_command(commands, "push", "knnext.cli.hub:push", text)
    add_push_options(c)
    return c


def add_pull_command(commands: Any) -> argparse.ArgumentParser:
    text = "fetch a datastore, or some of it, from the Hugging Face Hub"
    c = new_command(commands, "pull", "knnext.cli.hub:pull", text)
    add_pull_options(c)
    return c
