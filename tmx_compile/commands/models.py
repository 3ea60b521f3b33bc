"""Transformers models by name: their shape alone, without weights, for looking; with weights, for writing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tmx_compile.analysis.judge.language_model import call_arguments
from tmx_compile.backend import explain
from tmx_compile.config import TriangleMixConfig
from tmx_compile.errors import TriangleMixError
from tmx_compile.report import Report


def configuration(name: str) -> Any:
    """The Transformers configuration of a model; its weights are not looked at.

    Args:
        name: a folder with a ``config.json``, or a name that Transformers finds.

    Raises:
        ValueError: Transformers is not installed, or finds no configuration that it knows.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError(f"model needs the package transformers: pip install 'tmx-compile[hf]' ({error})") from None
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ValueError(f"model must be a folder with a config.json, {name!r} has none")
    if not Path(name).is_dir() and (name.startswith((".", "~")) or os.path.isabs(name)):
        raise ValueError(f"model must be a folder or a name that Transformers finds, there is no folder {name!r}")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model {name!r} has no configuration that can be loaded: {first_line(error)}") from error


def depth_of(config: Any) -> int:
    """How many layers the language model of a Transformers configuration has. ``ValueError`` where it does not tell."""
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"model must tell num_hidden_layers, {type(config).__name__} has {depth!r}")
    return depth


def explain_shape(
    config: Any, triangle: TriangleMixConfig, *, tokens: int, device: str, dtype: str | None, lowering: str
) -> Report:
    """The report for one prompt of a model of which only the configuration is known; takes no memory for weights.

    The weights are fake tensors on ``device``, so that lowerings answer for that device.

    Args:
        config: a Transformers configuration.
        triangle: the layers and the geometry.
        tokens: length of the prompt, batch size 1, without padding.
        device: "cpu" or "cuda".
        dtype: of the weights, as in ``torch.float32``; None: what the configuration names.
        lowering: as for ``tmx_backend``.

    Raises:
        ValueError: Transformers has no causal language model for the configuration, or it cannot be traced
            without weights.
        LoweringError: the lowering that was named cannot take a layer.
    """
    from transformers import AutoModelForCausalLM

    kind = None if dtype is None else getattr(torch, dtype)
    try:
        # On meta, because drawing initial values is the one thing that a fake CUDA tensor may not allow.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=kind).eval()
    except (ValueError, ImportError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"model cannot be built from its {type(config).__name__}: {first_line(error)}") from error
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device=device)
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        try:
            return explain(model, input_ids=ids, config=triangle, lowering=lowering, **call_arguments(model, keep=1))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            # Our own words rather than Dynamo's around them.
            if isinstance(error.inner_exception, TriangleMixError):
                raise error.inner_exception from error
            raise _untraceable(config, error.inner_exception) from error
        # A model may do anything at all with numbers that are not there.
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            raise _untraceable(config, error) from error


def load_model(name: str, dtype: str) -> nn.Module:
    """A causal language model of Transformers with its weights, on the CPU, for inference.

    ``ValueError`` where Transformers is not installed, or cannot load the model.
    """
    configuration(name)
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    return model.eval()


def first_line(error: BaseException) -> str:
    """The first line of an error's message: libraries explain at length, a command's error is one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _untraceable(config: Any, error: Exception) -> ValueError:
    return ValueError(f"model of {type(config).__name__} cannot be traced without its weights: {first_line(error)}")
