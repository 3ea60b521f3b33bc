"""Which model it is: a fingerprint of structure and weights that costs little and survives a change of precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Elements looked at in each tensor. Training moves nearly all of them, so a few tell two checkpoints apart.
_SAMPLES = 64
# What `torch.compile` and data parallelism put before a name.
_WRAPPERS = ("_orig_mod.", "module.")


@dataclass(frozen=True)
class ModelFingerprint:
    """Digests of a model's parameters.

    Attributes:
        structure: of their names and shapes.
        weights: of some elements of each, rounded to bfloat16: the same for a float32 model and for its bfloat16 copy.
    """

    structure: str
    weights: str

    @classmethod
    def of(cls, model: nn.Module) -> ModelFingerprint:
        """Fingerprint a model; reads a few elements of each parameter.

        ``ValueError`` for what is no module, a module without parameters, and parameters without storage ("meta").
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        structure, weights = hashlib.sha256(), hashlib.sha256()
        named = sorted((_name(name), parameter) for name, parameter in model.named_parameters())
        if not named:
            raise ValueError(f"model must have parameters, {type(model).__name__} has none")
        for name, parameter in named:
            if parameter.device.type == "meta":
                raise ValueError(f"model must have its weights, parameter {name} is on the meta device")
            structure.update(f"{name}{tuple(parameter.shape)};".encode())
            weights.update(_sampled(parameter))
        return cls(structure.hexdigest()[:16], weights.hexdigest()[:16])

    @classmethod
    def from_dict(cls, data: Any) -> ModelFingerprint:
        """Read what :meth:`to_dict` gave; ``ValueError`` for anything else."""
        if not isinstance(data, Mapping) or set(data) != {"structure", "weights"}:
            raise ValueError(f"fingerprint must hold structure and weights, got {json.dumps(data)}")
        return cls(str(data["structure"]), str(data["weights"]))

    def to_dict(self) -> dict[str, str]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def check(self, model: nn.Module) -> None:
        """Raise ``ValueError`` unless ``model`` is the fingerprinted one, saying what differs."""
        found = ModelFingerprint.of(model)
        if found.structure != self.structure:
            raise ValueError(
                f"it is for another model: its parameters' names and shapes have the digest {self.structure}, those of "
                f"{type(model).__name__} {found.structure}"
            )
        if found.weights != self.weights:
            raise ValueError(
                f"it is for other weights of the same architecture: digest {self.weights}, those of this "
                f"{type(model).__name__} {found.weights}"
            )


def _name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _sampled(parameter: Tensor) -> bytes:
    with torch.no_grad():
        flat = parameter.detach().reshape(-1)
        if flat.numel() == 0:
            return b""
        count = min(_SAMPLES, flat.numel())
        # Integer arithmetic: a float index would round in large tensors.
        places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
        # Byte by byte, for want of a promise that numpy is installed.
        return bytes(flat[places].to("cpu", torch.bfloat16).view(torch.uint8).tolist())
