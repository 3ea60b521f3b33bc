"""What holds while a captured model runs: the state that its module is in, and Dynamo's patience."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def as_is(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients of its weights; everything is put back.

    Gradients of activations alone need far less memory, and a linear layer keeps nothing for them. Grad mode stays on
    in every run, so that Dynamo has one graph for all.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    own, compiled = torch.is_inference_mode_enabled(), getattr(model, "_compiled_call_impl", None)
    if own:
        raise ValueError("calibration needs autograd: call it outside torch.inference_mode()")
    for parameter in wanted:
        parameter.requires_grad_(False)
    model.eval()
    # `model.compile()` would run its own graph inside ours.
    model._compiled_call_impl = None
    try:
        with torch.enable_grad():
            yield
    finally:
        model._compiled_call_impl = compiled
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextlib.contextmanager
def unlimited_recompiles() -> Iterator[None]:
    """Past its limit Dynamo would run the model as it is, unmeasured; and these must not use up the user's."""
    with torch._dynamo.config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31):
        yield
