"""Each bad argument of an op: real and fake tensors must refuse it in the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def refusal(op: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        op(*args, **kwargs)
    return _words(error.value)


def _words(error: BaseException) -> str:
    """The complaint itself: torch adds a stack trace of its own to errors out of C++."""
    text = str(error)
    start = text.find("knnext::")
    assert start >= 0, f"not a complaint of knnext: {text}"
    return text[start:].split("\n")[0].strip()


def assert_refused(op: Callable[..., Any], match: str, *args: Any, **kwargs: Any) -> None:
    """Real and fake tensors raise one message, which holds `match`."""
    real = refusal(op, *args, **kwargs)
    assert match in real, real
    with FakeTensorMode() as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        fake_kwargs = {name: fake(value) for name, value in kwargs.items()}
        assert refusal(op, *map(fake, args), **fake_kwargs) == real
