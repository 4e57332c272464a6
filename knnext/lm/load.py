"""Models and tokenizers as they come from disk or a hub: whole, and without code of their own."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from knnext.devices import checked_device
from knnext.errors import MissingFileError, ModelError, missing_package
from knnext.lm.adapter import check_adapter, check_adapter_kind, with_adapter
from knnext.lm.causal import check_config
from knnext.lm.compiled import compile_blocks
from knnext.lm.gguf import check_gguf, check_libraries, gguf_type, quiet_conversion, split_gguf
from knnext.lm.identity import (
    model_identity,
    model_parts,
    note_origin,
    sha256,
    tokenizer_hash,
)
from knnext.lm.loaded import check_finite, check_tokenizer, check_weights, warn_of_offloading
from knnext.lm.model_dtype import check_model_dtype, dtype_to_load, too_narrow
from knnext.lm.model_folder import check_folder, read_json
from knnext.lm.quantized import check_quantization, check_was_quantized, quantization_config
from knnext.lm.running import quiet_transformers

__all__ = [
    "libraries",
    "load_lm",
    "load_tokenizer",
    "model_identity",
    "model_parts",
    "save_lm",
    "sha256",
    "tokenizer_hash",
]

_log = logging.getLogger(__name__)


def save_lm(path: str | Path, model: Any, tokenizer: Any) -> None:
    """Writes model and tokenizer as transformers does; ``load_lm`` or AutoModel read them."""
    with _quiet_bars():
        model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def load_lm(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    device: str | None = None,
    model_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    gguf: str | Path | None = None,
    adapter: str | Path | None = None,
    merge_adapter: bool = False,
    device_map: Any = None,
    quantization: Any = None,
    compile: bool = False,
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) from a folder that ``save_lm`` wrote, or a hub name.

    Python code that a model brings is run only with ``trust_remote_code=True``; nothing is asked.
    Weights that are pickled are read without running what is in them.

    Args:
        device: where the model goes; None: the CPU.
        model_dtype: "auto": on a GPU the checkpoint's; on the CPU bfloat16 where checkpoint and
            processor have it (AMX, AVX-512 BF16), else float32. "checkpoint": the checkpoint's
            anywhere. Or "bfloat16", "float16", "float32".
        attn_implementation: such as "sdpa" or "eager"; None: transformers' choice.
        revision: branch, tag or commit of a hub name.
        tokenizer: folder or hub name of another tokenizer than the model's.
        gguf: the GGUF file in the folder or repository that holds the weights; ``path`` may also be
            that file itself.
        adapter: folder or hub name of a PEFT adapter that changes weights (LoRA and the like); with
            ``merge_adapter`` they are changed for good, which is faster and rounds once more.
        device_map: such as "auto", which spreads a model over the GPUs here; then no ``device``.
        quantization: "8bit" or "4bit" (bitsandbytes: LLM.int8(), NF4), "torchao:int8wo",
            "torchao:int8dq" or "torchao:float8wo", or a quantization config of transformers.
        compile: compile all blocks but the last, in which keys are read, at their first call.

    MissingFileError where ``path`` reads like a folder and is none, or lacks a file. ModelError,
    which says why, where the folder's files are damaged, weights are missing or of other shapes
    than the config wants, the model is no causal LM, or it wants to run code of its own.
    MissingPackageError where an option needs a package that is not installed.
    """
    path, gguf = split_gguf(path, gguf)
    folder = Path(path).expanduser()
    if not folder.is_dir() and (isinstance(path, Path) or path.startswith((".", "/", "~"))):
        raise MissingFileError(f"no language model at {path}: there is no such folder")
    source = str(folder if folder.is_dir() else path)
    dtype_name = check_model_dtype(model_dtype)
    _check_options(source, folder, device, revision, device_map, adapter, merge_adapter)
    kind = None if quantization is None else check_quantization(quantization)
    if kind is not None and gguf is not None:
        raise ValueError(f"quantization {kind} is for weights that are not: {gguf} is GGUF")
    if kind is not None and merge_adapter:
        raise ValueError(
            f"merge_adapter puts an adapter into the weights, which quantization {kind} packs: "
            "leave one of them out, or save the merged model first"
        )
    _, transformers = libraries()
    facts: dict[str, str] = {}
    if gguf is not None:
        check_libraries()
        if folder.is_dir():
            gguf = str(check_gguf(folder, gguf).absolute())
            facts["quantization"] = gguf_type(Path(gguf))
    elif folder.is_dir():
        check_folder(folder, tokenizer=tokenizer is None)
    adapter_source = None if adapter is None else check_adapter(adapter)
    if adapter_source is not None:
        check_adapter_kind(adapter_source)  # before a large model is read
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    if gguf is not None:
        options["gguf_file"] = gguf
    with _quiet_loading():
        if not trust_remote_code:
            _check_attention(attn_implementation)
            if gguf is None:
                _check_code(source, _written_config(folder, source, revision))
        with _reasons(source, "configuration"):
            config = transformers.AutoConfig.from_pretrained(source, **options)
        check_config(config, source)
        _check_kind(config, source, trust_remote_code)
        if tokenizer is None:
            with _reasons(source, "tokenizer"):
                words = transformers.AutoTokenizer.from_pretrained(source, **options)
        else:
            words = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        if device_map is not None:
            options["device_map"] = device_map
        at = device or ("cpu" if device_map is None or not torch.cuda.is_available() else "cuda")
        declared = getattr(config, "dtype", None)
        if gguf is None and getattr(config, "quantization_config", None) is not None:
            if kind is not None:
                raise ValueError(f"quantization {kind}: {source} is quantized already")
            # What is quantized already keeps the types that its kernels want.
            dtype_name = "checkpoint" if dtype_name == "auto" else dtype_name
        dtype = dtype_to_load(dtype_name, declared, at, gguf=gguf is not None)
        if kind is not None:
            given = kind == "given"
            compute = declared if dtype == "auto" else dtype
            chosen = quantization if given else quantization_config(kind, compute)
            # They are packed where they lie, and some cannot be moved after that.
            options = {"device_map": {"": device or "cpu"}, **options}
            options["quantization_config"] = chosen
        model, info = _read_model(source, config, dtype, options)
        if gguf is not None and not folder.is_dir():
            cached = transformers.utils.cached_file(source, gguf, revision=revision)
            facts["quantization"] = gguf_type(Path(cached))
        if too_narrow(model.dtype, dtype_name, at):  # only the weights told their dtype
            model, info = _read_model(source, config, torch.float32, options)
    check_weights(info, source)
    check_finite(model, source)
    warn_of_offloading(model, source)
    if kind is not None:
        check_was_quantized(model, kind, source)
    if tokenizer is not None:
        check_tokenizer(words, model, tokenizer, source)
    if adapter_source is not None:
        wrapped = with_adapter(model, adapter_source)
        if merge_adapter:
            facts["adapter"] = f"merged {model_parts(wrapped)['adapter']}"
        # The layers hold the adapter: without the wrapper it is a model like any other.
        model = wrapped.merge_and_unload() if merge_adapter else wrapped.get_base_model()
    note_origin(model, facts)
    if device is not None and model.device != torch.device(device) and kind is None:
        model = model.to(device)
    model = model.eval()
    _log.info("loaded %s: %s, %s, %s", source, type(model).__name__, model.dtype, model.device)
    if compile:
        compile_blocks(model)
    return model, words


def _read_model(
    source: str, config: Any, dtype: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    _, transformers = libraries()
    with _reasons(source, "model"), quiet_conversion():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            config=copy.deepcopy(config),
            dtype=dtype,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    return model, info


def _check_options(
    source: str,
    folder: Path,
    device: str | None,
    revision: str | None,
    device_map: Any,
    adapter: Any,
    merge_adapter: bool,
) -> None:
    """ValueError for options that do not go together, MissingPackageError for lack of one."""
    if device is not None:
        checked_device(device)
    if revision is not None and folder.is_dir():
        raise ValueError(
            f"revision {revision!r} is for a hub name; {source} is a folder, which has one state"
        )
    if merge_adapter and adapter is None:
        raise ValueError("merge_adapter is for an adapter, and none is given")
    if device_map is not None:
        if device is not None:
            raise ValueError(
                f"device_map {device_map!r} places the model itself: give no device ({device!r})"
            )
        try:
            import accelerate  # noqa: F401
        except ImportError as error:
            raise missing_package("device_map needs", "accelerate", "accelerate") from error


def _check_attention(attn_implementation: str | None) -> None:
    if attn_implementation is not None and "/" in attn_implementation:
        raise ValueError(
            f"attn_implementation {attn_implementation!r} is code from a hub; knnext runs none "
            "unless it is told to by --trust-remote-code (in Python: trust_remote_code=True)"
        )


def load_tokenizer(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    gguf: str | Path | None = None,
) -> Any:
    """The tokenizer of a folder or hub name, with the same care for code that it brings."""
    path, gguf = split_gguf(path, gguf)
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    folder = Path(path).expanduser()
    if gguf is not None:
        check_libraries()
        options["gguf_file"] = str(check_gguf(folder, gguf).absolute() if folder.is_dir() else gguf)
    _, transformers = libraries()
    with _reasons(str(path), "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(
            str(folder if folder.is_dir() else path), trust_remote_code=trust_remote_code, **options
        )


def _written_config(folder: Path, source: str, revision: str | None) -> dict[str, Any]:
    """config.json as it stands there: a config object does not keep all of it."""
    if folder.is_dir():
        return read_json(folder / "config.json")
    with _reasons(source, "configuration"):
        options = {} if revision is None else {"revision": revision}
        reader = libraries()[1].PretrainedConfig
        found: dict[str, Any] = reader.get_config_dict(source, **options)[0]
    return found


_CODE_WANTED = (
    "{source} wants to run Python code of its own ({named}); knnext runs none unless it is told to "
    "by --trust-remote-code (in Python: trust_remote_code=True), once you have read that code"
)


def _check_code(source: str, config: dict[str, Any]) -> None:
    """ValueError where the model cannot be opened without code that it brings.

    A model whose type transformers knows has an ``auto_map`` too at times; then transformers' own
    class is used, and the folder's code is left alone.
    """
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING and config.get("auto_map"):
        named = f"auto_map in {source}/config.json: {_listed(config['auto_map'])}"
        raise ModelError(_CODE_WANTED.format(source=source, named=named))
    for name, value in _implementations(config):
        named = f"{name} in {source}/config.json: {value}, code from a hub"
        raise ModelError(_CODE_WANTED.format(source=source, named=named))


def _implementations(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Attentions and the like, anywhere in a config, that are named by a repository of code."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _implementations(value, f"{key}.{name}" if key else name)
    elif "implementation" in key and isinstance(config, str) and "/" in config:
        yield key, config


def _listed(auto_map: Any) -> str:
    if not isinstance(auto_map, dict):
        return str(auto_map)
    return ", ".join(f"{kind} = {code}" for kind, code in list(auto_map.items())[:4])


def _check_kind(config: Any, source: str, trust_remote_code: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (code and trust_remote_code):
        return
    if code:
        named = f"auto_map in its config.json: AutoModelForCausalLM = {code}"
        raise ModelError(_CODE_WANTED.format(source=source, named=named))
    kind = getattr(config, "model_type", "") or type(config).__name__
    raise ModelError(
        f"{source} is a model of type {kind!r}, which transformers does not know as a causal "
        "(left-to-right) language model"
    )


def _mapped_code(folder: Path) -> str:
    for path in (folder / "tokenizer_config.json", folder / "config.json"):
        code = read_json(path).get("auto_map") if path.is_file() else None
        if code:
            return f"auto_map in {path}: {_listed(code)}"
    return ""


@contextmanager
def _reasons(source: str, part: str) -> Iterator[None]:
    """Errors of transformers inside the block as one line that names the model and the reason."""
    try:
        yield
    except ImportError:
        raise  # it names the package that is missing
    except Exception as error:  # whatever the reader of a format raises
        text = str(error).strip()
        if "trust_remote_code" in text:
            named = _mapped_code(Path(source)) or f"the {part}'s auto_map"
            raise ModelError(_CODE_WANTED.format(source=source, named=named)) from error
        line = (text.splitlines() or [""])[0][:300]
        kind = MissingFileError if isinstance(error, OSError) else ModelError
        hint = "" if Path(source).exists() else f" (and there is no folder {source} here)"
        raise kind(
            f"the {part} of {source} cannot be loaded: {type(error).__name__}: {line}{hint}"
        ) from error


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """No bars of transformers inside the block where stderr is no terminal; as before after it."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    if was_on and not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bars, and no report of weights that do not fit: that is an error, said in words here."""
    with quiet_transformers(), _quiet_bars():
        yield


def libraries() -> tuple[Any, Any]:
    """The modules tokenizers and transformers; MissingPackageError that says how to get them."""
    try:
        import tokenizers
        import transformers
    except ImportError as error:
        raise missing_package("language models need", "transformers", "lm") from error
    return tokenizers, transformers
