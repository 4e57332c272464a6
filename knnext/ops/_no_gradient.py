"""For ops that choose: their outputs never require grad, and asking for one does not warn."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

# Python-side definitions live as long as this object.
_KEEP = torch.library.Library("knnext", "FRAGMENT")


def register_no_gradient(name: str) -> None:
    """Lets the dispatcher skip autograd for the op ``knnext::name``.

    Without this, torch's fallback returns outputs that require grad and warns in the backward.
    (``register_autograd`` would do too, but refuses schemas with keyword-only tensors.)
    """
    _KEEP.impl(name, torch.library.fallthrough_kernel, "Autograd")


def refuse_second_derivative(name: str) -> None:
    """Makes the op ``knnext::name``, itself a gradient, say that there is none of it."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"knnext::{name}: no autograd formula was registered for a gradient")

    torch.library.register_autograd(f"knnext::{name}", refuse)
