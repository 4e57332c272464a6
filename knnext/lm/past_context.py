"""What a model's failure past its context is about, in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from knnext.lm.running import context_length


@contextmanager
def explained(model: nn.Module, given: int | None, asked: int) -> Iterator[None]:
    """Says what a failure past the context is about: models say "index out of range in self"."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        limit = context_length(model)
        if limit is None or given is None or given + asked <= limit:
            raise
        wanted = f"{given} tokens given" + (f" and {asked} asked for" if asked else "")
        raise ValueError(
            f"{wanted} are more than the {limit} of the base model's context, where it failed: "
            f"{error}"
        ) from error


def num_tokens(ids: Any) -> int | None:
    return ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 2 else None


def num_asked(model: nn.Module, given: int | None, kwargs: dict[str, Any]) -> int:
    """How many tokens ``generate`` was asked for; transformers' own default is 20."""
    default = getattr(model, "generation_config", None)
    for source in (
        kwargs.get,
        lambda name: getattr(kwargs.get("generation_config"), name, None),
        lambda name: getattr(default, name, None),
    ):
        if (count := source("max_new_tokens")) is not None:
            return int(count)
        if (length := source("max_length")) is not None:
            return max(0, int(length) - (given or 0))
    return 20
