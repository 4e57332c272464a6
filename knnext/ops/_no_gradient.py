"""For ops that choose: their outputs never require grad, and asking for one does not warn."""

from __future__ import annotations

import torch

# Python-side definitions live as long as this object.
_KEEP = torch.library.Library("knnext", "FRAGMENT")


def register_no_gradient(name: str) -> None:
    """Lets the dispatcher skip autograd for the op ``knnext::name``.

    Without this, torch's fallback returns outputs that require grad and warns in the backward.
    (``register_autograd`` would do too, but refuses schemas with keyword-only tensors.)
    """
    _KEEP.impl(name, torch.library.fallthrough_kernel, "Autograd")
