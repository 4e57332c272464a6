"""The base figure is the one that others measure, where they read the same windows.

lm-evaluation-harness reads each document alone in windows that do not overlap, the last one full;
Hugging Face's recipe reads one text in windows that do, and its window of L tokens predicts L - 1.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from knnext.corpus import Document, TokenizedDocuments, tokenize
from knnext.evaluation import evaluate, search_stream
from tests.evaluation.noise import NoiseIndex
from tests.lm.tiny_models import VOCAB, tiny, transformers

CONTEXT = 64  # of the tiny models
TOLERANCE = 1e-5  # nats per token

#: Shorter than a window, exactly one and several, some more, and a single word.
SIZES = (20, 64, 65, 128, 1, 150, 63, 90)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A word a token; 1 is bos."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    words = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        model_max_length=CONTEXT,
    )


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, size in enumerate(SIZES):
        ids = torch.randint(3, VOCAB, (size,), generator=generator).tolist()
        found.append(Document(f"d{number}", " ".join(f"w{i}" for i in ids)))
    return found


def attentive(name: str) -> Any:
    """A tiny model to which it matters what stands before."""
    model = copy.deepcopy(tiny(name))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def base_nll(model: Any, text: TokenizedDocuments, **windows: Any) -> Any:
    """What `knnext eval` says of the base model."""
    scores = search_stream(
        model, NoiseIndex(), text, k=2, key_layer="att", allow_overlap=True, **windows
    )
    return evaluate(scores, 1.0, 0.1, resamples=1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bloom"])
def test_lm_evaluation_harness(name: str, tokenizer: Any, documents: list[Document]) -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model = attentive(name)
    text = tokenize(documents, tokenizer, words="harness")
    found = base_nll(
        model,
        text,
        separate_documents=True,
        full_last_window=True,
        block_size=CONTEXT,
        stride=CONTEXT,
    )
    wrapped = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=CONTEXT)
    asked = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(d.text,), idx=0)
        for d in documents
    ]
    total = sum(wrapped.loglikelihood_rolling(asked, disable_tqdm=True))
    assert found.num_tokens == sum(SIZES) and found.num_words == sum(SIZES)
    assert found.base.nll == pytest.approx(-total / sum(SIZES), abs=TOLERANCE)
    # word_perplexity of its wikitext task
    assert found.base.word == pytest.approx(math.exp(-total / found.num_words), rel=TOLERANCE)
    # With the last window as short as what is left, it is another figure.
    other = base_nll(model, text, separate_documents=True, block_size=CONTEXT, stride=CONTEXT)
    assert abs(other.base.nll + total / sum(SIZES)) > TOLERANCE


@pytest.mark.parametrize("stride", [16, 32, 63])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hugging_faces_strided_perplexity(
    name: str, stride: int, tokenizer: Any, documents: list[Document]
) -> None:
    """https://huggingface.co/docs/transformers/perplexity, on the same stream of tokens."""
    model, text = attentive(name), tokenize(documents, tokenizer)
    ids = torch.from_numpy(text.tokens).long()[None]
    length, before, total, count = ids.shape[1], 0, 0.0, 0
    for begin in range(0, length, stride):
        end = min(begin + CONTEXT, length)
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())  # a label is that of the token before it
        total, count, before = total + float(loss) * scored, count + scored, end
        if end == length:
            break
    found = base_nll(model, text, block_size=CONTEXT - 1, stride=stride)
    assert found.num_tokens == count == length - 1
    assert found.base.nll == pytest.approx(total / count, abs=TOLERANCE)
