"""``knnext plan``: what a datastore will need, from rates measured here or stated by datasheets."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.errors import MissingFileError
from knnext.say import Say, binary_size

if TYPE_CHECKING:
    from knnext.planning import Job, Plan
    from knnext.planning.model_shape import ModelShape
    from knnext.planning.rates import Rates


def plan(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """The command. ``exit_code`` is 1 where something does not fit."""
    from knnext.datastore.room import free_bytes
    from knnext.planning import make_plan
    from knnext.planning.placement import usual_batch

    shape = _shape(args)
    gpus = _gpus() if args.gpus is None else args.gpus
    rates, notes = _rates(args, gpus)
    job = _job(args, shape, gpus)
    if args.batch_size is None:
        job = usual_batch(job, rates.machine)
    free = free_bytes(args.disk) if args.free is None else args.free
    made = make_plan(job, rates, free=free, must_stay=args.resident)
    made = replace(made, notes=[*notes, *made.notes])
    for line in render(made):
        say(line)
    return {**made.to_json(), "exit_code": int(not made.fits)}


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _shape(args: argparse.Namespace) -> ModelShape:
    from knnext.planning.model_shape import described, read_shape

    if args.model is not None:
        shape = read_shape(args.model, args.key_layer, args.revision)
        given = {name: getattr(args, name) for name in ("dim", "layers", "params")}
        wrong = [name for name, value in given.items() if value is not None and name != "dim"]
        if wrong:
            raise ValueError(f"--{wrong[0]} is for a plan without --model, which tells it")
        return shape if args.dim is None else replace(shape, dim=args.dim)
    if args.dim is None:
        raise ValueError(
            "give --model (a folder or hub name, whose configuration is read), or --dim and, where "
            "they are known, --layers and --params"
        )
    return described(args.dim, args.layers, args.params)


def _job(args: argparse.Namespace, shape: ModelShape, gpus: int) -> Job:
    from knnext.lm.windows import build_stride
    from knnext.planning import Job

    block = args.block_size or min(shape.context or 1024, 1024)
    return Job(
        tokens=args.tokens,
        shape=shape,
        gpus=gpus,
        nodes=args.nodes,
        k=args.k,
        dtype=args.key_dtype,
        model_dtype=args.model_dtype or ("bfloat16" if gpus else "float32"),
        codes=args.codes,
        index=args.index,
        nprobe=args.nprobe,
        queries=args.queries,
        block=block,
        stride=args.stride or build_stride(block),
        batch=args.batch_size or 1,
        disks=args.disks,
    )


def _rates(args: argparse.Namespace, gpus: int) -> tuple[Rates, list[str]]:
    """The rates to plan with, and what is to be said about them."""
    from knnext.planning.rates import kept_path, read_rates, this_machine
    from knnext.planning.stated import STATED

    stated = STATED["h200" if gpus else "cpu"]
    machine = this_machine()
    notes: list[str] = []
    if args.rates in STATED:
        found = STATED[args.rates]
        if gpus and not found.machine.gpus:
            raise ValueError(f"--rates {args.rates} is of a machine without GPUs: give --gpus 0")
    elif args.rates is None or args.rates == "here":
        path = kept_path(machine)
        try:
            found = read_rates(path).over(stated)
        except FileNotFoundError:
            if args.rates == "here":
                raise MissingFileError(
                    f"nothing was measured on this machine yet ({machine.describe()}): run "
                    "`knnext doctor --rates`"
                ) from None
            found = stated
            notes.append(
                "rates are stated by datasheets; `knnext doctor --rates` measures this machine's"
            )
        if gpus and not machine.gpus and found is not stated:
            found = stated
            notes.append("this machine has no GPU: its rates say nothing of a plan with GPUs")
    else:
        found = read_rates(args.rates).over(stated)
        if gpus and not found.machine.gpus:
            raise ValueError(f"{args.rates} was measured on a machine without GPUs: give --gpus 0")
        if found.machine != machine:
            notes.append(f"rates of another machine: {found.machine.describe()}")
    if why := found.aged():
        notes.append(f"rates may no longer hold: {why}; measure again by `knnext doctor --rates`")
    changes = {"memory": args.memory, "gpu_memory": args.gpu_memory}
    given = {name: size for name, size in changes.items() if size is not None}
    return replace(found, machine=replace(found.machine, **given)), notes


def render(made: Plan) -> list[str]:
    """The plan for a terminal."""
    from knnext.planning.placement import rank_memory
    from knnext.planning.words import duration, rate_text

    job, where, rates = made.job, made.placement, made.rates
    kind = f"{job.gpus} GPU{'' if job.gpus == 1 else 's'} each" if job.gpus else "no GPUs"
    lines = [
        f"{job.tokens:,} tokens of {job.shape.name}: keys of {job.shape.dim:,} {job.dtype}, k "
        f"{job.k:,}",
        f"{job.nodes} node{'' if job.nodes == 1 else 's'}, {kind}: {job.ranks} "
        f"rank{'' if job.ranks == 1 else 's'}; {rates.machine.describe()}",
        "",
        "disk",
    ]
    sizes = {name: binary_size(size) for name, size in made.disk.items()}
    sizes["together"] = binary_size(sum(made.disk.values()))
    if made.free is not None:
        sizes["free"] = binary_size(made.free)
    lines += [f"  {name:<16}{size:>14}" for name, size in sizes.items()]
    memory = binary_size(rank_memory(job, rates.machine))
    lines += [
        "",
        f"memory of a rank, of {memory}",
        f"  {'building':<16}{binary_size(made.build_memory):>14}",
        f"  {'searching':<16}{binary_size(where.working + where.held):>14}  {where.tier}",
    ]
    if not where.resident and made.resident_ranks is not None:
        lines.append(f"  {'':<30}  {made.resident_ranks:,} ranks would keep all resident")
    if job.ranks > 1:
        sent = binary_size(job.traffic.a_rank)
        lines.append(
            f"  {'traffic':<16}{sent:>14}  sent by a rank for {job.batch_queries:,} queries"
        )
    lines += ["", "time"]
    for stage in made.stages:
        note = f"  {stage.note}" if stage.note else ""
        lines.append(f"  {stage.name:<32}{duration(stage.seconds):>12}{note}")
    lines += ["", "rates"]
    for name, rate in made.used_rates().items():
        lines.append(f"  {name:<22}{rate_text(name, rate['value']):>16}  {rate['source']}")
    if rates.created:
        lines.append(f"  measured {rates.created[:10]} on {rates.machine.describe()}")
    lines += ["", *(f"note: {note}" for note in made.notes)] if made.notes else []
    lines += ["", *(f"does not fit: {why}" for why in made.refusals)] if made.refusals else []
    return lines


def measure_rates(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """``knnext doctor --rates``: measure, keep, and tell where."""
    from knnext.planning.measure import Sizes, measure
    from knnext.planning.rates import keep

    folder = Path(args.disk)
    if not folder.is_dir():
        raise NotADirectoryError(f"--disk {folder}: there is no such folder to measure a disk in")
    chosen = {"dim": args.dim, "k": args.k, "entries": args.entries, "queries": args.queries}
    given = {name: value for name, value in chosen.items() if value is not None}
    sizes = replace(Sizes(), **given)
    forward = None if args.model is None else _forward_of(args.model)
    say("rates of this machine, the best of a few runs each:")
    rates = measure(sizes, say, folder=folder, forward=forward)
    path = keep(rates)
    say(f"kept in {path}, for `knnext plan`")
    return {"path": str(path), **rates.to_json()}


def _forward_of(model: str) -> Any:
    """A pass of the user's own model over some windows."""
    import torch

    from knnext.lm.hidden_states import default_block_size, hidden_states
    from knnext.lm.load import load_lm
    from knnext.planning.measure import Forward
    from knnext.planning.model_shape import read_shape

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded, _ = load_lm(model, device=device)
    block = default_block_size(loaded)
    windows = 16 if device == "cuda" else 1
    size = loaded.get_input_embeddings().weight.shape[0]
    stream = torch.arange(windows * block, device="cpu") % size

    def run() -> None:
        for _ in hidden_states(loaded, stream, block_size=block, stride=block, batch_size=windows):
            pass

    shape = replace(read_shape(model), name=model)
    return Forward(run, windows * block, block, shape)
