"""The command explore: a local page on which a text shows what its neighbors do to it."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from typing import Any

from knnext.cli.session import Settings, check_model, open_datastore, open_index, open_model
from knnext.say import Say


def explore(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    # What is missing is said before a model is loaded.
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401

    from knnext.explore.server import Server
    from knnext.explore.session import Session

    settings = Settings.of(args)
    store = open_datastore(args)
    temperature, lmbda = settings.mixture()
    model, tokenizer = open_model(args, store)
    check_model(store, model, tokenizer)
    session = Session(
        model,
        tokenizer,
        store,
        open_index(args, store, settings, say),
        k=settings.k,
        temperature=temperature,
        lmbda=lmbda,
        max_tokens=args.max_tokens,
    )
    server = Server(
        session, _facts(args, settings), host=args.host, port=args.port, seconds=args.seconds
    )
    try:
        say(f"open        {server.address}")
        say("            Ctrl-C ends it")
        server.run()
    except KeyboardInterrupt:
        say("ended")
    if not server.service.worker.idle.wait(0.3):
        # A search that is under way cannot be told to stop, and holds nothing worth waiting for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    # Else the interpreter's end looks through all that torch and a model hold, for seconds.
    gc.freeze()
    return {"host": server.host, "port": server.port}


def _facts(args: argparse.Namespace, settings: Settings) -> dict[str, str]:
    tuned = f"temperature {settings.temperature:.4g}, λ {settings.lmbda:.4g}, k {settings.k:,}"
    index = settings.index + (", real score" if settings.rescore else "")
    return {
        "datastore": str(args.datastore),
        "model": str(args.model),
        "search": "exact" if index == "exact" else f"FAISS ({index})",
        "mixture": tuned,
    }
