"""The commands demo and doctor."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from typing import Any

from knnext.demo import run_demo
from knnext.demo.config import SHORT, DemoConfig
from knnext.say import Say


def demo(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    given = {f.name: getattr(args, f.name) for f in fields(DemoConfig)}
    chosen = {name: value for name, value in given.items() if value is not None}
    config = DemoConfig(**{**(SHORT if args.short else {}), **chosen})
    return run_demo(config, args.out, fresh=args.fresh, say=say)


def doctor(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.cli.doctor import Search, doctor, render

    given = {f.name: getattr(args, f.name) for f in fields(Search)}
    chosen = {name: value for name, value in given.items() if value is not None}
    facts = doctor(Search(**{**asdict(Search()), **chosen}) if chosen else None)
    say(render(facts))
    return facts
