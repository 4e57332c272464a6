"""The command demo."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from knnext.demo import run_demo
from knnext.demo.config import SHORT, DemoConfig
from knnext.say import Say


def demo(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    given = {f.name: getattr(args, f.name) for f in fields(DemoConfig)}
    chosen = {name: value for name, value in given.items() if value is not None}
    config = DemoConfig(**{**(SHORT if args.short else {}), **chosen})
    return run_demo(config, args.out, fresh=args.fresh, say=say)
