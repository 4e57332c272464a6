"""The command demo."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from knnext.demo import run_demo
from knnext.demo.config import DemoConfig, sizes
from knnext.demo.pretrained import SMOLLM2
from knnext.say import Say


def demo(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    given = {f.name: getattr(args, f.name) for f in fields(DemoConfig)}
    chosen = {name: value for name, value in given.items() if value is not None}
    if args.pretrained:
        if args.model is not None:
            raise ValueError(f"--pretrained is SmolLM2, --model {args.model} another: give one")
        chosen["model"] = SMOLLM2
    finished = "model" in chosen
    if finished and args.train_seconds is not None:
        raise ValueError("--train-seconds is for the LM that the demo trains; this one is finished")
    config = DemoConfig(**{**sizes(finished=finished, short=args.short), **chosen})
    return run_demo(config, args.out, fresh=args.fresh, say=say)
