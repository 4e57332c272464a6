"""Models in wrappers: compiled, offloaded, with adapters, quantized. States, KNNLM and identity."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knnext import KNNLM
from knnext.index import ExactIndex
from knnext.lm.hidden_states import hidden_states
from knnext.lm.identity import model_identity, model_parts
from knnext.lm.key_layer import capture_hidden_states, find_key_module
from tests.lm.tiny_models import VOCAB, num_hooks, random_tokens, tiny

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:LlamaForCausalLM runs uncompiled"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOKENS = random_tokens(24)
READ = {"att": "model.layers.2.mlp", "ffn": "lm_head"}


def whole(model: Any, _: Path) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any, _: Path) -> Any:
    model.compile(backend="eager")
    return model


def forward_alone(model: Any, _: Path) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def by_blocks(model: Any, _: Path) -> Any:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def wrapped_blocks(model: Any, _: Path) -> Any:
    layers = model.model.layers
    for number, block in enumerate(layers):
        layers[number] = torch.compile(block, backend="eager")
    return model


def in_cpu_memory(model: Any, _: Path) -> Any:
    return pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


def on_a_disk(model: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def in_parts(model: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    places = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    places |= {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk"}
    places["lm_head"] = "disk"
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


Way = Callable[[Any, Path], Any]
COMPILED: list[Way] = [whole, in_place, forward_alone, by_blocks, wrapped_blocks]
OFFLOADED: list[Way] = [in_cpu_memory, on_a_disk, in_parts]


def named(way: Any) -> str:
    return way.__name__ if callable(way) else str(way)


def slow_but_one(way: Way) -> Any:
    """Torch's compiler takes seconds for each."""
    return way if way is by_blocks else pytest.param(way, marks=pytest.mark.slow)


def read_by_hand(model: nn.Module, name: str) -> Tensor:
    """(L, D) what the module of that name reads in one plain pass."""
    module = next(m for n, m in model.named_modules() if n.endswith(name))
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    with torch.no_grad():
        model(input_ids=TOKENS[None, :-1])
    handle.remove()
    return found[0]


def states(model: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
    """Keys and log p of the LM, of all positions but the last."""
    batches = hidden_states(
        model, TOKENS, key_layer=layer, block_size=24, dtype=torch.float32, with_log_p_lm=True
    )
    found = list(batches)
    log_p = [b.log_p_lm for b in found if b.log_p_lm is not None]
    return torch.cat([b.keys for b in found]), torch.cat(log_p)


@pytest.fixture(scope="module")
def index() -> ExactIndex:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(300, 32, generator=generator)
    return ExactIndex.from_tensors(keys, torch.randint(3, VOCAB, (300,), generator=generator))


def check_knnlm(model: Any, reference: Any, layer: str, index: ExactIndex, off: float) -> None:
    options: dict[str, Any] = {"k": 8, "temperature": 20.0, "lmbda": 0.7, "key_layer": layer}
    lm, wanted = KNNLM(model, index, **options), KNNLM(reference, index, **options)
    ids = TOKENS[None, :12]
    with torch.no_grad():
        found, right = lm(ids, labels=ids), wanted(ids, labels=ids)
        torch.testing.assert_close(found.logits, right.logits, atol=off, rtol=off)
        torch.testing.assert_close(found.loss, right.loss, atol=off, rtol=off)
        with lm.attached() as attached:
            inside = attached(input_ids=ids).logits
    torch.testing.assert_close(inside, right.logits, atol=off, rtol=off)
    given = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(lm.generate(ids, **given), wanted.generate(ids, **given))


@pytest.mark.parametrize("way", [*map(slow_but_one, COMPILED), *OFFLOADED], ids=named)
def test_it_is_the_model_that_it_was(way: Way, tmp_path: Path, index: ExactIndex) -> None:
    """Also after it has run, when what is compiled is there and would pass hooks by."""
    model = way(copy.deepcopy(tiny("llama")), tmp_path)
    with torch.no_grad():
        model(input_ids=TOKENS[None])
    for layer, name in READ.items():
        keys, log_p = states(model, layer)
        assert torch.equal(keys, read_by_hand(tiny("llama"), name))
        assert torch.equal(log_p, states(tiny("llama"), layer)[1])
        assert find_key_module(model, layer).name == name
        with torch.no_grad(), capture_hidden_states(model, layer) as captured:
            model(input_ids=TOKENS[None, :-1])
        assert torch.equal(captured.states(1)[0], keys)
        check_knnlm(model, tiny("llama"), layer, index, 1e-6)
    named_by_hand = states(model, "module:model.layers.1.mlp:input")[0]
    assert torch.equal(named_by_hand, read_by_hand(tiny("llama"), "model.layers.1.mlp"))
    assert model_identity(model) == model_identity(tiny("llama"))
    assert model_parts(model) == model_parts(tiny("llama"))
    with torch.no_grad():  # compiled code that is allowed again
        assert torch.equal(
            model(input_ids=TOKENS[None]).logits, tiny("llama")(input_ids=TOKENS[None]).logits
        )


@pytest.mark.parametrize("way", [in_cpu_memory, on_a_disk], ids=named)
def test_tied_weights_are_one_also_where_they_are_offloaded(way: Way, tmp_path: Path) -> None:
    model = way(copy.deepcopy(tiny("gpt2")), tmp_path)
    assert model_identity(model) == model_identity(tiny("gpt2"))


def test_a_model_that_must_not_be_moved(tmp_path: Path, index: ExactIndex) -> None:
    """Not by what takes a KNNLM for a model, either: it has empty weights, or some on each GPU."""
    model = in_parts(copy.deepcopy(tiny("llama")), tmp_path / "weights")
    lm, ids = KNNLM(model, index, k=4), TOKENS[:9]
    with torch.no_grad():
        wanted = KNNLM(tiny("llama"), index, k=4)(ids[None], labels=ids[None])
    for move in (lm.cuda, lm.half, lm.float, lambda: lm.to("cpu"), lambda: lm.to(torch.float16)):
        with pytest.raises(RuntimeError, match="can't move a model"):
            move()
    assert lm.hf_device_map is model.hf_device_map
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = transformers.Trainer(
        model=lm,
        args=transformers.TrainingArguments(str(tmp_path), **options),
        eval_dataset=[{"input_ids": ids, "labels": ids}],
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.loss.item(), rel=1e-5)
    with torch.no_grad():
        assert torch.equal(lm(ids[None]).logits, wanted.logits)
    assert not hasattr(KNNLM(tiny("llama"), index, k=4), "hf_device_map")


def test_a_model_that_is_moved(index: ExactIndex) -> None:
    lm = KNNLM(copy.deepcopy(tiny("llama")), index, 4, 2.0, nn.Parameter(torch.tensor(0.3)))
    assert lm.to("cpu") is lm and lm.main_input_name == "input_ids"
    assert lm.half().dtype == torch.float16 and lm.float().dtype == torch.float32
    assert lm.to(dtype=torch.bfloat16).dtype == torch.bfloat16 == lm.lmbda.dtype


def test_lost_speed_is_warned_of() -> None:
    model = by_blocks(copy.deepcopy(tiny("llama")), Path())
    with pytest.warns(UserWarning, match=r"runs uncompiled: .* inside of model\.layers\.2"):
        states(model, "att")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        states(model, "ffn")  # which is read behind all blocks


def test_compile_blocks_leaves_the_last_alone(saved: Callable[[str], Path]) -> None:
    from torch._dynamo.testing import CompileCounter

    from knnext.lm.compiled import compile_blocks

    torch._dynamo.reset()  # what other tests have compiled of these blocks, often enough to give up
    counter, real = CompileCounter(), nn.Module.compile
    model = copy.deepcopy(tiny("llama"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(nn.Module, "compile", lambda self: real(self, backend=counter))
        warnings.simplefilter("error", UserWarning)
        compile_blocks(model)
        for layer in READ:
            assert torch.equal(states(model, layer)[0], states(tiny("llama"), layer)[0])
    assert [b._compiled_call_impl is None for b in model.model.layers] == [False, False, True]
    assert counter.frame_count == 1  # once for both
    assert model_identity(model) == model_identity(tiny("llama"))


def test_compiling_a_knnlm_whole_says_what_to_compile(index: ExactIndex) -> None:
    lm = KNNLM(copy.deepcopy(tiny("llama")), index, k=2)
    compiled = torch.compile(lm, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"a KNNLM is no graph.*load_lm\(compile=True\)"):
        compiled(input_ids=TOKENS[None])


def test_an_index_without_values_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"has no values.*from_tensors\(keys, values\)"):
        KNNLM(tiny("llama"), ExactIndex.from_tensors(torch.zeros(4, 32)), k=2)


# Adapters


def adapted(kind: str, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(copy.deepcopy(tiny("llama")), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "embed" not in name:  # as training would leave them
            torch.nn.init.normal_(parameter, std=0.2)
    return model


ADAPTERS: dict[str, dict[str, Any]] = {
    "Lora": {"r": 2, "target_modules": "all-linear"},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "Vera": {"r": 2, "target_modules": ["q_proj", "o_proj"]},
    "LNTuning": {},
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_are_not_merged(kind: str, index: ExactIndex) -> None:
    model = adapted(kind, **ADAPTERS[kind])
    inner = model.get_base_model()
    for layer, name in READ.items():
        keys, _ = states(model, layer)
        assert torch.equal(keys, read_by_hand(model, name))
        assert not torch.equal(keys, states(tiny("llama"), layer)[0])
        check_knnlm(model, inner, layer, index, 1e-6)
    assert model_identity(model) == model_identity(inner)
    parts = model_parts(model)
    assert parts == model_parts(inner) and "adapter" in parts
    assert parts["weights"] == model_parts(tiny("llama"))["weights"]
    assert num_hooks(inner) == 0


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_virtual_tokens_are_refused(kind: str, index: ExactIndex) -> None:
    model = adapted(kind, num_virtual_tokens=3)
    message = r"puts virtual tokens before a text.*such as LORA, IA3"
    for attempt in (
        lambda: states(model, "att"),
        lambda: states(model, "ffn"),
        lambda: KNNLM(model, index),
        lambda: model_identity(model),
        lambda: find_key_module(model, "att"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


# Quantized


def by_torchao(kind: str) -> Callable[[], Any]:
    def make() -> Any:
        torchao = pytest.importorskip("torchao.quantization")
        model = copy.deepcopy(tiny("llama"))
        torchao.quantize_(model, getattr(torchao, kind)())
        return model

    return make


def dynamically(dtype: torch.dtype) -> Callable[[], Any]:
    def make() -> Any:
        model = copy.deepcopy(tiny("llama"))
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=dtype)

    return make


QUANTIZED = {
    "int8wo": by_torchao("Int8WeightOnlyConfig"),
    "int8dq": by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "dynamic qint8": dynamically(torch.qint8),
    "dynamic float16": dynamically(torch.float16),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_models(kind: str, index: ExactIndex) -> None:
    model = QUANTIZED[kind]()
    for layer, name in READ.items():
        keys, log_p = states(model, layer)
        assert torch.equal(keys, read_by_hand(model, name))
        assert find_key_module(model, layer).name == name
        plain_keys, plain_log_p = states(tiny("llama"), layer)
        assert 0 < (keys - plain_keys).abs().max() < 0.2
        torch.testing.assert_close(log_p, plain_log_p, atol=0.1, rtol=0.1)
        KNNLM(model, index, key_layer=layer)(TOKENS[None])
    parts = model_parts(model)
    assert "quantization" in parts and parts["dtype"] == "float32"
    assert model_identity(model) == model_identity(QUANTIZED[kind]())  # after it has run
    assert model_identity(model)[1] != model_identity(tiny("llama"))[1]
    other = copy.deepcopy(tiny("llama"))
    other.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1  # a weight that is packed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.lm.test_wrapped_models.tiny", lambda _: other)
        assert model_identity(QUANTIZED[kind]())[1] != model_identity(model)[1]


# Contexts and streams


@pytest.mark.parametrize("context", [2, 3, 4, 6])
def test_contexts_of_fewer_tokens_than_a_trace(context: int) -> None:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=context, n_embd=32, n_layer=2, n_head=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    for layer, name in (("att", "transformer.h.1.mlp"), ("ffn", "lm_head")):
        assert find_key_module(model, layer).name == name
        found = list(hidden_states(model, TOKENS, key_layer=layer, block_size=context))
        assert sum(map(len, found)) == len(TOKENS) - 1


@pytest.mark.parametrize("layer", ["att", "ffn"])
def test_a_model_of_two_streams_is_refused_for_what_it_is(layer: str) -> None:
    config = transformers.ProphetNetConfig(
        vocab_size=VOCAB, hidden_size=32, decoder_ffn_dim=40, num_decoder_layers=2,
        num_decoder_attention_heads=4, ngram=2, max_position_embeddings=64, is_decoder=True,
        is_encoder_decoder=False, add_cross_attention=False,
    )  # fmt: skip
    model = transformers.ProphetNetForCausalLM(config).eval()
    with pytest.raises(ValueError, match="2 states for each token") as error:
        find_key_module(model, layer)
    assert "future" not in str(error.value)
