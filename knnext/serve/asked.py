"""What a request asks for: its JSON read, checked and turned into texts to continue.

A field that is not known, or not served, is an error and not passed over: an answer must be to what
was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from knnext.serve.errors import Refused, bad
from knnext.serve.mixer import Mixture

#: Fields without a meaning for what is answered.
_SILENT = (
    "model", "user", "metadata", "store", "service_tier", "safety_identifier",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
)  # fmt: skip
#: Fields that are taken where they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
}
_BOTH = ("max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options")
_OWN = ("logprobs", "knn", *_BOTH, *_SILENT, *_NEUTRAL)
_MOST_TOP = 20
_MOST_STOPS = 16
_STOP_LENGTH = 1000
_WANTED = "prompt must be a text, a list of texts, token ids, or a list of those"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        context: tokens that the model reads, prompt and answer together; None for any number.
        vocab_size: ids are below it.
        max_tokens: new ones for each text.
        characters: of a text that can still fit into the context; None for any number.
        texts: prompts times ``n``.
        mixture: of the server; a request may have a smaller k.
    """

    context: int | None
    characters: int | None
    vocab_size: int
    max_tokens: int
    texts: int
    mixture: Mixture


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and the text that they were given as, where they were."""

    ids: list[int]
    text: str | None = None


@dataclass(frozen=True)
class Asked:
    """A request as the engine and the answers need it.

    Attributes:
        prompts: ``n`` continuations are wanted of each.
        max_tokens: new ones of each text, fewer where the context ends; 0 only reads.
        context: tokens that a prompt and its answer can have together; None for any number.
        temperature: 0 takes the likeliest.
        top: None for no log p, else of how many tokens beside the one chosen.
        echo: the answer begins with the prompt.
        usage: a stream ends with the numbers of tokens.
    """

    prompts: list[Prompt]
    max_tokens: int
    context: int | None
    mixture: Mixture
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    usage: bool = False
    top: int | None = None
    echo: bool = False
    chat: bool = field(default=False)

    @property
    def num_texts(self) -> int:
        return self.n * len(self.prompts)


def completion(body: dict[str, Any], tokenizer: Any, limits: Limits) -> Asked:
    """Of /v1/completions. Refused with 400 where something is not as it must be."""
    body = _known(body, (*_OWN, "prompt", "echo", "best_of"))
    given = _sampling(body, limits)
    if body.get("best_of", given["n"]) != given["n"]:
        raise bad("best_of is served only where it equals n", "best_of")
    prompts = _prompts(body, tokenizer, limits)
    longest = max(len(prompt.ids) for prompt in prompts)
    most = _max_tokens(body, ("max_tokens",), 16, longest, limits, "prompt")
    top = _whole(body, "logprobs", None, 0, _MOST_TOP)
    asked = Asked(prompts, most, limits.context, echo=_flag(body, "echo"), top=top, **given)
    return _checked(asked, limits)


def chat(body: dict[str, Any], tokenizer: Any, limits: Limits) -> Asked:
    """Of /v1/chat/completions; its prompt is the conversation in the tokenizer's chat template."""
    body = _known(body, (*_OWN, "messages", "max_completion_tokens", "top_logprobs"))
    given = _sampling(body, limits)
    prompt = _conversation(body, tokenizer, limits)
    _check_ids(prompt.ids, limits, "messages")
    names = ("max_completion_tokens", "max_tokens")
    given_tokens = len(prompt.ids)
    most = _max_tokens(body, names, limits.max_tokens, given_tokens, limits, "messages", 1)
    top = _whole(body, "top_logprobs", None, 0, _MOST_TOP)
    if _flag(body, "logprobs"):
        top = top or 0
    elif top is not None:
        raise bad("top_logprobs is for logprobs: true", "top_logprobs")
    return _checked(Asked([prompt], most, limits.context, top=top, chat=True, **given), limits)


def _known(body: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The fields that say something."""
    given = _said(body)
    for name, value in given.items():
        if name not in names:
            raise bad(f"unrecognized field {name!r:.100}", name[:100])
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise bad(f"{name} is not served here: leave it out", name)
    return given


def _said(given: dict[str, Any]) -> dict[str, Any]:
    """Null is as good as left out."""
    return {name: value for name, value in given.items() if value is not None}


def _sampling(body: dict[str, Any], limits: Limits) -> dict[str, Any]:
    stream = _flag(body, "stream")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise bad('stream_options must be {"include_usage": true or false}', "stream_options")
    options = _said(options)
    if _flag(options, "include_obfuscation"):
        raise bad("include_obfuscation is not served here: leave it out", "stream_options")
    if options and not stream:
        raise bad("stream_options is for stream: true", "stream_options")
    return {
        "mixture": _mixture(body, limits.mixture),
        "temperature": _number(body, "temperature", 1.0, 0, 2),
        "top_p": _number(body, "top_p", 1.0, 0, 1),
        "n": _whole(body, "n", 1, 1, limits.texts),
        "stop": _stops(body),
        "seed": _whole(body, "seed", None, -(2**63), 2**64 - 1),
        "stream": stream,
        "usage": _flag(options, "include_usage"),
    }


def _mixture(body: dict[str, Any], own: Mixture) -> Mixture:
    """The server's, changed by the field "knn": {"lmbda", "temperature", "k"}."""
    knn = body.get("knn", {})
    if not isinstance(knn, dict) or set(knn) - {"lmbda", "temperature", "k"}:
        raise bad("knn must be an object with lmbda, temperature, k, or some of them", "knn")
    knn = _said(knn)
    k = _whole(knn, "k", own.k, 1, own.k, "knn.")
    temperature = _number(knn, "temperature", own.temperature, 1e-9, 1e9, "knn.")
    return Mixture(k, temperature, _number(knn, "lmbda", own.lmbda, 0, 1, "knn."))


def _max_tokens(
    body: dict[str, Any],
    names: Sequence[str],
    default: int,
    given: int,
    limits: Limits,
    of: str,
    least: int = 0,
) -> int:
    """As asked for under the first of the names; by default ``default``, where one fits."""
    wanted = [_whole(body, name, None, least, limits.max_tokens) for name in names if name in body]
    if len(set(wanted)) > 1:
        raise bad(f"{' and '.join(names)} say two things: leave one out", names[0])
    if wanted:
        asked = wanted[0]
        if limits.context is not None and given + asked > limits.context:
            raise Refused(
                400,
                f"the model reads at most {limits.context} tokens: {given} in the prompt and "
                f"{asked} asked for are {given + asked}",
                param=of,
                code="context_length_exceeded",
            )
        return int(asked)
    room = default if limits.context is None else limits.context - given
    if room < 1:
        raise Refused(
            400,
            f"the model reads at most {limits.context} tokens, and the prompt has {given}: no room "
            "is left for an answer",
            param=of,
            code="context_length_exceeded",
        )
    return min(default, limits.max_tokens)


def _checked(asked: Asked, limits: Limits) -> Asked:
    if asked.num_texts > limits.texts:
        raise bad(
            f"a request may ask for at most {limits.texts} texts (prompts times n), this one asks "
            f"for {asked.num_texts}",
            "n",
        )
    return asked


def _prompts(body: dict[str, Any], tokenizer: Any, limits: Limits) -> list[Prompt]:
    given = body.get("prompt")
    if isinstance(given, str) or _are_ids(given):
        given = [given]
    if not isinstance(given, list) or not given:
        raise bad(_WANTED, "prompt")
    if len(given) > limits.texts:
        raise bad(f"at most {limits.texts} prompts, got {len(given)}", "prompt")
    found = [_prompt(one, tokenizer, limits) for one in given]
    for prompt in found:
        _check_ids(prompt.ids, limits, "prompt")
    return found


def _prompt(given: Any, tokenizer: Any, limits: Limits) -> Prompt:
    """Token ids as they are; a text led by the mark that led every document of the datastore."""
    from knnext.corpus import separator_token

    if isinstance(given, str):
        _check_text(given, "prompt")
        _check_length(given, limits, "prompt")
        # Special tokens spelled out in the text are text, as they are in a corpus.
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids = tokenizer(given, **options)["input_ids"]
        return Prompt([separator_token(tokenizer), *ids], given)
    if _are_ids(given):
        return Prompt(list(given))
    raise bad(_WANTED, "prompt")


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(token) is int for token in given)


def _check_length(text: str, limits: Limits, of: str) -> None:
    """Before it is read as tokens, for which the others would wait."""
    if limits.characters is not None and len(text) > limits.characters:
        raise Refused(
            400,
            f"the model reads at most {limits.context} tokens, which are at most "
            f"{limits.characters} characters, and the prompt has {len(text)}",
            param=of,
            code="context_length_exceeded",
        )


def _check_ids(ids: list[int], limits: Limits, of: str) -> None:
    wrong = next((token for token in ids if not 0 <= token < limits.vocab_size), None)
    if wrong is not None:
        raise bad(f"token ids must lie in [0, {limits.vocab_size}), got {wrong}", of)
    if limits.context is not None and len(ids) > limits.context:
        raise Refused(
            400,
            f"the model reads at most {limits.context} tokens, and the prompt has {len(ids)}",
            param=of,
            code="context_length_exceeded",
        )


def _conversation(body: dict[str, Any], tokenizer: Any, limits: Limits) -> Prompt:
    if not getattr(tokenizer, "chat_template", None):
        raise Refused(
            400,
            "this model's tokenizer has no chat template: use /v1/completions",
            code="no_chat_template",
        )
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad('messages must be a list of {"role", "content"}', "messages")
    plain = [_message(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like, as jinja2's TemplateError
        words = " ".join(str(error).split())
        raise bad(f"the chat template refuses these messages: {words:.300}", "messages") from None
    _check_length(text, limits, "messages")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise bad("the chat template makes nothing of these messages", "messages")
    return Prompt(list(ids))


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise bad("each message must be an object with a role and a content", "messages")
    # Clients send back what they were answered, with fields that hold nothing.
    given = {name: value for name, value in message.items() if value not in (None, [])}
    unknown = set(given) - {"role", "content", "name"}
    if unknown:
        raise bad(f"messages with {sorted(unknown)[0]!r:.100} are not served here", "messages")
    given["content"] = _content(message.get("content"))
    for name, value in given.items():
        if not isinstance(value, str):
            raise bad(f"the {name} of a message must be a text", "messages")
        _check_text(value, "messages")
    return given


def _content(given: Any) -> Any:
    """A text; parts of one are put together, and parts of other types refused."""
    if not isinstance(given, list):
        return given
    texts = []
    for part in given:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise bad("the parts of a content must be of type text", "messages")
        texts.append(text)
    return "".join(texts)


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad(f"{name} holds half a surrogate pair, which is no character", name) from None


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    given = body.get("stop", [])
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, list) or len(strings) > _MOST_STOPS:
        raise bad(f"stop must be a text or a list of at most {_MOST_STOPS}", "stop")
    for one in strings:
        if not isinstance(one, str) or not 0 < len(one) <= _STOP_LENGTH:
            raise bad(f"stop must hold texts of 1 to {_STOP_LENGTH} characters", "stop")
    return tuple(strings)


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise bad(f"{name} must be true or false, got {value!r:.80}", name)
    return value


def _number(
    body: dict[str, Any], name: str, default: float, least: float, most: float, of: str = ""
) -> float:
    if name not in body:
        return default
    value = body[name]
    good = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared as it is: a whole number can be too large for a float, and NaN is nowhere between.
    if not good or not least <= value <= most:
        raise bad(
            f"{of}{name} must be a number from {least:g} to {most:g}, got {value!r:.80}", of + name
        )
    return float(value)


def _whole(
    body: dict[str, Any], name: str, default: int | None, least: int, most: int, of: str = ""
) -> Any:
    value = body.get(name, default)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise bad(
            f"{of}{name} must be a whole number from {least} to {most}, got {value!r:.80}",
            of + name,
        )
    return value
