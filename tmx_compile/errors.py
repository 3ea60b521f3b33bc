"""Exceptions of the package.

Bad arguments are plain ``ValueError``; the classes here are for the compiler's own refusals.
"""

from __future__ import annotations


class TriangleMixError(RuntimeError):
    """Base class of every error that the pass or a lowering raises about a graph.

    >>> from tmx_compile import LoweringError, StrictModeError, TriangleMixError
    >>> issubclass(LoweringError, TriangleMixError) and issubclass(StrictModeError, TriangleMixError)
    True
    """


class StrictModeError(TriangleMixError):
    """A site in a triangle layer stayed dense, and the user asked for ``strict=True``.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig, rewrite
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         return F.scaled_dot_product_attention(x, x, x)  # not causal
    >>> program = torch.export.export(torch.nn.Sequential(Layer()), (torch.randn(1, 2, 300, 16),))
    >>> rewrite(program, TriangleMixConfig.deepest(1, num_layers=1, min_seq_len=256), strict=True)
    Traceback (most recent call last):
    ...
    tmx_compile.errors.StrictModeError: 0: the mask is not causal (no mask and is_causal=False)
    """


class LoweringError(TriangleMixError):
    """The lowering that the user named cannot handle a call; the message names the lowering and the reason.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import LoweringError, TriangleMixConfig, rewrite
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         return F.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> program = torch.export.export(torch.nn.Sequential(Layer()), (torch.randn(1, 2, 6000, 16),))
    >>> config = TriangleMixConfig.deepest(1, num_layers=1, sliding_window_size=5000)
    >>> try:
    ...     rewrite(program, config, lowering="blocked")
    ... except LoweringError as error:
    ...     print(error)
    lowering 'blocked' cannot take this attention: blocked: window=5000 is more than 4096
    """


class VerificationError(TriangleMixError):
    """The rewritten graph broke one of the pass's own invariants; always a defect of this package.

    >>> from tmx_compile import TriangleMixError, VerificationError
    >>> issubclass(VerificationError, TriangleMixError)
    True
    """


class UnsupportedEngineError(TriangleMixError):
    """A serving engine of a version that is not known here, or not as it is known; the message names what differs."""
