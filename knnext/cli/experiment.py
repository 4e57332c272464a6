"""The command experiment."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from knnext.cli.session import loading
from knnext.experiments.catalog import NAMES, OPTIONS, load
from knnext.experiments.lab.presets import Preset, preset
from knnext.say import Say

#: Options of the command line that are fields of `Preset`.
_FIELDS = (
    *("model", "corpus", "max_bytes", "train_steps", "entries", "valid_tokens", "test_tokens"),
    *("document_tokens", "k", "factory", "nprobe", "seeds", "steps"),
)


def experiment(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """`list`, one experiment, `all`, or `report`."""
    chosen = _chosen(args.only)
    if args.name == "list":
        return _list(say)
    if args.name == "report":
        from knnext.experiments.report import write_report

        return {"files": [str(path) for path in write_report(Path(args.out), chosen, say)]}
    settings = _preset(args)
    if args.name == "all":
        return _all(args, settings, chosen, say)
    if args.only:
        raise ValueError("--only goes with all and report; name the experiment alone")
    from knnext.experiments.run import run_experiment

    return run_experiment(args.name, settings, args.out, fresh=args.fresh, say=say)


def _all(
    args: argparse.Namespace, settings: Preset, chosen: tuple[str, ...], say: Say
) -> dict[str, Any]:
    from knnext.experiments.report import write_report
    from knnext.experiments.run import run_all

    results, failures = run_all(settings, args.out, names=chosen, fresh=args.fresh, say=say)
    files = write_report(Path(args.out), tuple(results), say) if results else []
    if failures:
        words = "; ".join(f"{name}: {error}" for name, error in failures.items())
        raise RuntimeError(f"{len(failures)} of {len(chosen)} experiments failed: {words}")
    agreements = {name: result["agreement"] for name, result in results.items()}
    return {"agreement": agreements, "files": [str(path) for path in files]}


def _list(say: Say) -> dict[str, Any]:
    found = {name: load(name).DESCRIPTION for name in NAMES}
    width = max(map(len, NAMES))
    for name, description in found.items():
        say(f"{name:{width}}  {description.question}")
    return {name: description.question for name, description in found.items()}


def _chosen(only: list[str] | None) -> tuple[str, ...]:
    for name in only or ():
        if name not in NAMES:
            raise ValueError(f"experiment must be one of {', '.join(NAMES)}; got {name!r}")
    return tuple(name for name in NAMES if only is None or name in only)


def _preset(args: argparse.Namespace) -> Preset:
    start = preset(args.preset or "small")
    known = {f.name for f in fields(Preset)}
    given = {name: getattr(args, name) for name in _FIELDS if name in known}
    loading_options = loading(args)
    if loading_options.get("model_dtype") == "checkpoint":
        del loading_options["model_dtype"]
    if loading_options and not (args.model or start.model):
        option = next(iter(loading_options)).replace("_", "-")
        raise ValueError(f"--{option} is for a model that is given: --model is missing")
    options = {**start.options, **dict(_option(text) for text in args.set)}
    return start.with_options(**given, options=options, model_options=loading_options or None)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    experiment_name, dot, option = name.partition(".")
    if not equals or not dot or not option or experiment_name not in NAMES:
        raise ValueError(f"--set must be EXPERIMENT.OPTION=JSON, got {text!r}")
    if option not in OPTIONS[experiment_name]:
        known = ", ".join(OPTIONS[experiment_name])
        raise ValueError(f"--set {name}: {experiment_name} has no such option, but {known}")
    try:
        return name, json.loads(value)
    except ValueError:
        raise ValueError(f"--set {name} must be given JSON, got {value!r}") from None
