"""What calibration runs on: prompts with the token that answers them, and where a model's output has its logits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tmx_compile.analysis.capture.capture import Inputs


@dataclass(frozen=True)
class Sample:
    """A prompt of B sequences.

    Attributes:
        inputs: the call of the model.
        answer: (B,) int64, the token that follows each prompt; None: the one that the model finds most likely.

    >>> import torch
    >>> from tmx_compile.analysis import Inputs, Sample
    >>> Sample(Inputs(kwargs={"input_ids": torch.zeros(2, 60, dtype=torch.int64)}), torch.tensor([7, 9])).lengths()
    {60}
    """

    inputs: Inputs
    answer: Tensor | None = None

    def lengths(self) -> set[int]:
        """The lengths of its token ids (tokens): of every two-dimensional integer tensor among the inputs."""
        values = (*self.inputs.args, *self.inputs.kwargs.values())
        return {x.shape[1] for x in values if isinstance(x, Tensor) and x.dim() == 2 and x.dtype == torch.int64}

    def digest(self) -> str:
        """The same for the same values, in every process."""
        found = hashlib.sha256()
        for value in (*self.inputs.args, *sorted(self.inputs.kwargs.items()), self.answer):
            _feed(found, value)
        return found.hexdigest()[:16]


Batch: TypeAlias = Tensor | Mapping[str, Any] | tuple[Any, Tensor] | Sample
"""A prompt: token ids (B, N), or the model's keyword arguments; or a pair of these and the answers' token ids (B,)."""


def samples_of(batches: Iterable[Batch]) -> Iterator[Sample]:
    """Read batches one by one. ``ValueError``, with its number, for one that is none."""
    for number, batch in enumerate(batches):
        try:
            yield _sample(batch)
        except ValueError as error:
            raise ValueError(f"batches[{number}] {error}") from None


def _sample(batch: Any) -> Sample:
    if isinstance(batch, Sample):
        return batch
    answer: Tensor | None = None
    if isinstance(batch, tuple):
        if len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise ValueError("must be a pair of inputs and a tensor of answers where it is a tuple")
        batch, answer = batch
        if answer.dim() != 1 or answer.dtype != torch.int64:
            raise ValueError(f"must have answers of shape (B,) and int64, got {tuple(answer.shape)} {answer.dtype}")
    if isinstance(batch, Tensor):
        return Sample(Inputs((batch,)), answer)
    if isinstance(batch, Mapping):
        return Sample(Inputs(kwargs=dict(batch)), answer)
    raise ValueError(f"must be token ids, keyword arguments, or one of them with answers, got {type(batch).__name__}")


def final_logits(output: Any, inputs: Inputs, positions: int) -> Tensor:
    """The logits (B, P, V) of the last P positions that are no padding, P at most ``positions``.

    ``output`` is a tensor (B, N, V), has it as ``logits``, or has it first. Padding on the right is read from an
    ``attention_mask`` (B, N) among the keyword arguments.

    Raises:
        ValueError: no such tensor, or fewer positions than tokens where there is padding on the right.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) and output else None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.dtype.is_floating_point:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(f"the model's output must be or have logits (B, N, V), got {what}")
    count = min(positions, logits.shape[1])
    mask = inputs.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask[:, -1].bool().all()):
        return logits[:, -count:]
    if mask.shape[1] != logits.shape[1]:
        raise ValueError(
            f"padding on the right needs the logits of all {mask.shape[1]} tokens, the model gave {logits.shape[1]}; "
            "pad on the left, or ask it for all"
        )
    place = torch.arange(mask.shape[1], device=mask.device)
    end = torch.where(mask.bool(), place + 1, 0).amax(1)
    index = (end[:, None] - count + torch.arange(count, device=mask.device)).clamp(min=0)
    return logits.gather(1, index[..., None].to(logits.device).expand(-1, -1, logits.shape[2]))


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        # A copy: a single element counts as contiguous with any stride, and could not be viewed as bytes.
        flat = value.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        # Byte by byte, for want of a promise that numpy is installed.
        digest.update(bytes(flat.view(torch.uint8).tolist()))
    elif isinstance(value, (tuple, list)):
        digest.update(f"{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        digest.update(f"{value!r};".encode())
    else:
        # The text of any other object may hold its address.
        digest.update(f"{type(value).__name__};".encode())
