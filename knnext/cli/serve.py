"""The command serve: a kNN-LM behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from typing import TYPE_CHECKING, Any

from knnext.cli.session import Settings, check_model, open_datastore, open_index, open_model
from knnext.say import Say

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.serve.engine import Engine

#: Seconds that are left to a search at the end, which cannot be told to stop.
_LAST = 0.3


def serve(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    # What is missing is said before a model is loaded.
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401

    from knnext.serve.app import Service
    from knnext.serve.guard import is_loopback
    from knnext.serve.listening import Listener

    settings = Settings.of(args)
    store = open_datastore(args)
    mixture = settings.mixture()
    key = _key(args)
    service = Service(args.name or args.model, args.host, key, args.grace)
    listener = Listener(args.host, args.port)
    say(f"listening   {listener.url}/v1, model {service.name}; Ctrl-C ends it")
    if not is_loopback(args.host):
        say(_warning(args.host, key is not None))
    try:
        service.load(lambda: _engine(args, store, settings, mixture, say), lambda: say("ready"))
        listener.run(service.app(), service, connections=1024)
    except KeyboardInterrupt:
        say("ended")
    finally:
        listener.close()
    if service.error is not None:
        raise service.error
    if not service.ended(_LAST):
        # A search or a load that is under way cannot be told to stop, and holds nothing.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    # Else the interpreter's end looks through all that torch and a model hold, for seconds.
    gc.freeze()
    return {"host": args.host, "port": listener.port, "model": service.name}


def _engine(
    args: argparse.Namespace,
    store: Datastore,
    settings: Settings,
    mixture: tuple[float, float],
    say: Say,
) -> Engine:
    from knnext.lm.knnlm import KNNLM
    from knnext.serve.engine import Engine

    model, tokenizer = open_model(args, store)
    check_model(store, model, tokenizer)
    index = open_index(args, store, settings, say)
    mixed = KNNLM(model, index, min(settings.k, store.num_entries), *mixture)
    engine = Engine(
        mixed,
        tokenizer,
        max_batch=args.max_batch,
        queue=args.queue,
        seconds=args.seconds,
        max_tokens=args.max_tokens,
    )
    if not engine.reader.together:
        say("note        this model reads each text by itself; searches are made for all at once")
    return engine


def _key(args: argparse.Namespace) -> str | None:
    """That requests must hold; out of the environment, it stands in no list of processes."""
    key: str | None = args.api_key
    if key is None:
        key = os.environ.get("KNNEXT_API_KEY")
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise ValueError("the API key must be printable ASCII, with no space around it, not empty")
    return key


def _warning(host: str, has_key: bool) -> str:
    whom = "who knows the API key" if has_key else "who can reach this machine (no --api-key)"
    return (
        f"warning     {host} is not this machine alone: everyone {whom} can use the model and read "
        "the datastore through it; keys and texts travel unencrypted"
    )
