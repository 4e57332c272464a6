"""Options of ``knnext plan`` and of ``knnext doctor --rates``."""

from __future__ import annotations

import argparse

from knnext.cli.arguments import add_key_dtype, checked, natural, num_bytes, positive, refuse_dtype

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def count(text: str) -> int:
    """``3e9``, ``3B``, ``1_000_000``."""
    wanted = "a whole number of at least 1, as 3e9, 3B or 3000000000"
    number, scale = text.strip(), 1
    if number[-1:].upper() in _SUFFIXES:
        number, scale = number[:-1], _SUFFIXES[number[-1].upper()]

    def convert(_: str) -> int:
        value = float(number) * scale
        if value != int(value):
            raise ValueError("not a whole number")
        return int(number) * scale if number.isdigit() else int(value)

    return checked(convert, text, lambda value: value >= 1, wanted)


def add_plan_options(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--tokens", type=count, required=True, help="rows of the datastore, as 3e9 or 3B"
    )
    c.add_argument("--model", help="folder or hub name, of which only the configuration is read")
    c.add_argument("--revision", help="branch, tag or commit of a hub name")
    c.add_argument("--key-layer", default="att", help="as of build; default: att")
    c.add_argument("--dim", type=positive, help="width of a key; default: the model's")
    c.add_argument("--layers", type=positive, help="blocks of a model that is not there")
    c.add_argument("--params", type=count, help="its parameters, as 7B")
    c.add_argument(
        "--gpus", type=natural, help="GPUs of each node; default: as many as here; 0: CPUs"
    )
    c.add_argument("--nodes", type=positive, default=1, help="machines; default: 1")
    c.add_argument("--k", type=positive, default=1024, help="neighbors per query; default: 1024")
    c.add_argument(
        "--queries",
        type=positive,
        default=4096,
        help="searched at once, of all ranks; default: 4096",
    )
    add_key_dtype(c, "float16")
    refuse_dtype(c, keys=True, model=True)
    c.add_argument(
        "--model-dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16 on GPUs, else float32",
    )
    c.add_argument("--codes", action="store_true", help="with eight-bit codes of the keys")
    c.add_argument(
        "--index",
        nargs="?",
        const="default",
        metavar="FACTORY",
        help="with a FAISS index; without a factory string the one that `index` would take",
    )
    c.add_argument("--nprobe", type=positive, default=32, help="lists to visit; default: 32")
    c.add_argument("--block-size", type=positive, help="as of build")
    c.add_argument("--stride", type=positive, help="as of build; default: build's")
    c.add_argument("--batch-size", type=positive, help="as of build; default: build's")
    c.add_argument(
        "--resident", action="store_true", help="refuse what would have to stream in a search"
    )
    c.add_argument(
        "--disk",
        default=".",
        metavar="FOLDER",
        help="where the datastore will lie; default: the current folder",
    )
    c.add_argument("--free", type=num_bytes, metavar="SIZE", help="of the disk; default: as it has")
    c.add_argument(
        "--disks",
        type=positive,
        default=1,
        help="disks that work at once; default: 1, a file system that all nodes share",
    )
    c.add_argument("--memory", type=num_bytes, metavar="SIZE", help="of a node")
    c.add_argument("--gpu-memory", type=num_bytes, metavar="SIZE", help="of a GPU")
    c.add_argument(
        "--rates",
        metavar="here|h200|a100|cpu|FILE",
        help="measured here, or stated; default: here, where `knnext doctor --rates` has run and "
        "the plan is for such a machine, else h200 with GPUs and cpu without",
    )


def add_rates_options(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--rates",
        action="store_true",
        help="measure what `knnext plan` computes with, and keep it; under a minute if idle",
    )
    c.add_argument("--model", help="with --rates: time its forward pass, not that of a made one")
    c.add_argument(
        "--disk",
        default=".",
        metavar="FOLDER",
        help="with --rates: measure the disk of this folder; default: the current one",
    )
