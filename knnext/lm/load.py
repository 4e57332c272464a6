"""Models and tokenizers as they come from disk or a hub: whole, and without code of their own."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knnext.lm.causal import check_config
from knnext.lm.identity import model_identity, sha256, tokenizer_hash
from knnext.lm.model_folder import check_folder, read_json

__all__ = [
    "libraries",
    "load_lm",
    "load_tokenizer",
    "model_identity",
    "save_lm",
    "sha256",
    "tokenizer_hash",
]


def save_lm(path: str | Path, model: Any, tokenizer: Any) -> None:
    """Writes model and tokenizer as transformers does; ``load_lm`` or AutoModel read them."""
    with _quiet_bars():
        model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def load_lm(path: str | Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) from a folder that ``save_lm`` wrote, or a hub name.

    Python code that a model brings is run only with ``trust_remote_code=True``; nothing is asked.
    Weights that are pickled are read without running what is in them.

    FileNotFoundError where ``path`` reads like a folder and is none, or lacks a file. ValueError,
    which says why, where the folder's files are damaged, weights are missing or of other shapes
    than the config wants, the model is no causal LM, or it wants to run code of its own.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() and (isinstance(path, Path) or path.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"no language model at {path}: there is no such folder")
    source = str(folder if folder.is_dir() else path)
    _, transformers = libraries()
    if folder.is_dir():
        check_folder(folder)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _quiet_loading():
        if not trust_remote_code:
            _check_code(source, _written_config(folder, source))
        with _reasons(source, "configuration"):
            config = transformers.AutoConfig.from_pretrained(source, **options)
        check_config(config, source)
        _check_kind(config, source, trust_remote_code)
        with _reasons(source, "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        with _reasons(source, "model"):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
    _check_weights(info, source)
    _check_finite(model, source)
    return model.eval(), tokenizer


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name, with the same care for code that it brings."""
    _, transformers = libraries()
    with _reasons(str(path), "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=trust_remote_code
        )


def _written_config(folder: Path, source: str) -> dict[str, Any]:
    """config.json as it stands there: a config object does not keep all of it."""
    if folder.is_dir():
        return read_json(folder / "config.json")
    with _reasons(source, "configuration"):
        found: dict[str, Any] = libraries()[1].PretrainedConfig.get_config_dict(source)[0]
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
        raise ValueError(_CODE_WANTED.format(source=source, named=named))
    for name, value in _implementations(config):
        named = f"{name} in {source}/config.json: {value}, code from a hub"
        raise ValueError(_CODE_WANTED.format(source=source, named=named))


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
        raise ValueError(_CODE_WANTED.format(source=source, named=named))
    kind = getattr(config, "model_type", "") or type(config).__name__
    raise ValueError(
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
            raise ValueError(_CODE_WANTED.format(source=source, named=named)) from error
        line = (text.splitlines() or [""])[0][:300]
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"the {part} of {source} cannot be loaded: {type(error).__name__}: {line}"
        ) from error


def _check_weights(info: Any, source: str) -> None:
    """ValueError that names the tensors that would be left at random numbers."""
    found = info if isinstance(info, dict) else info.to_dict()
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    wrong = sorted(found["mismatched_keys"], key=lambda item: str(item[0]))
    if missing:
        text = f"{source} lacks weights of its model: {_some(missing)}"
        if unexpected:
            text += f"; it has others that the model does not know: {_some(unexpected)}"
        raise ValueError(f"{text}. They would be random numbers")
    if wrong:
        shown = [f"{name} is {tuple(given)}, not {tuple(wanted)}" for name, given, wanted in wrong]
        raise ValueError(f"{source} has weights of other shapes than its config: {_some(shown)}")
    if found.get("error_msgs"):
        lines = [str(message).strip().splitlines()[0] for message in found["error_msgs"]]
        raise ValueError(f"the weights of {source} cannot be loaded: {_some(lines)}")
    if unexpected:
        warnings.warn(
            f"{source} has {len(unexpected):,} weights that its model, as its config describes it, "
            f"does not use: {_some(unexpected)}",
            stacklevel=3,
        )


def _check_finite(model: Any, source: str) -> None:
    """ValueError that names parameters with inf or nan: every state would be nan."""
    broken = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if broken:
        raise ValueError(f"{source} has weights that are inf or nan: {_some(broken)}")


def _is_finite(parameter: Any) -> bool:
    if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
        return True
    try:
        low, high = parameter.detach().aminmax()  # nan comes through
    except (RuntimeError, NotImplementedError):  # an 8-bit type that torch only stores
        return True
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:4])
    return shown if len(items) <= 4 else f"{shown} and {len(items) - 4} more"


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
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with _quiet_bars():
            yield
    finally:
        logging.set_verbosity(level)


def libraries() -> tuple[Any, Any]:
    try:
        import tokenizers
        import transformers
    except ImportError as error:
        raise ImportError(
            'language models need transformers and tokenizers: pip install "knnext[lm]"'
        ) from error
    return tokenizers, transformers
