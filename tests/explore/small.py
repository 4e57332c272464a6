"""A small model with a datastore of some documents, for all tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.lm.tiny_models import transformers

WORDS = "the quick brown fox jumps over a lazy dog é 漢字 🦊".split()  # noqa: SIM905
CONTEXT = 32
TEMPERATURE, LMBDA, K = 0.05, 0.4, 16
TEXT = "the quick brown fox jumps over a lazy 🦊 dog, the fox and 漢字 over the lazy fox again"


def make(folder: Path) -> None:
    """`folder/model` and `folder/store`."""
    from knnext.corpus import Document, tokenize
    from knnext.datastore.build import build_datastore
    from knnext.lm.load import save_lm
    from knnext.lm.train import train_tokenizer

    rng = np.random.default_rng(0)
    documents = [Document(f"{number}.txt", " ".join(rng.choice(WORDS, 60))) for number in range(8)]
    documents.append(Document("<b>nasty</b>.txt", "<script>document.title = 'owned'</script> " * 4))
    tokenizer = train_tokenizer(documents, 300)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    save_lm(folder / "model", model, tokenizer)
    build_datastore(model, tokenizer, tokenize(documents, tokenizer), folder / "store")


def open_session(folder: Path, **options: Any) -> Any:
    from knnext.datastore import Datastore
    from knnext.explore import Session
    from knnext.index import ExactIndex
    from knnext.lm.load import load_lm

    model, tokenizer = load_lm(folder / "model")
    store = Datastore.open(folder / "store")
    given = {"k": K, "temperature": TEMPERATURE, "lmbda": LMBDA, **options}
    return Session(model, tokenizer, store, ExactIndex(store, device="cpu"), **given)
