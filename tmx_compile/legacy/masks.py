"""Explicit (N, N) masks: the original API of TriangleMix, for inspection, plots and small inputs.

A mask takes N x N elements here. The compiler and the kernels never build one: they read the geometry.

Row i is the query, column j the key, both counted from 0 (the paper, arXiv 2507.21526, counts from 1). With
``near = j < num_sink_tokens or i - j <= sliding_window_size`` the causal triangle has three sections::

    streaming = causal and near
    last      = causal and not near and i >= N - num_last_tokens
    middle    = causal and not near and i <  N - num_last_tokens

They are disjoint and sum to the causal triangle; a triangle layer attends to streaming and last.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.mask import formula

# Masks are N x N each, so only a few are worth their memory: dense and triangle of two lengths.
_MAX_CACHED_MASKS = 4
# The dtypes that hold -inf; most 8-bit floats would store a NaN or a finite value instead.
_INF_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Sections(NamedTuple):
    """The boolean (N, N) planes from which every mask is put together."""

    causal: torch.Tensor
    near: torch.Tensor
    last_rows: torch.Tensor  # (N, 1)


class TriangleMixMaskGenerator:
    """Builds the masks of one configuration; ``num_sink_tokens`` and the rest are read from ``config``.

    Every ``_create_*`` method returns an (N, N) tensor of 0 and 1 (1 = in the section) of the given dtype. The sections
    are those of the paper (TriangleMix, arXiv 2507.21526), which counts rows and columns from 1.

    Raises:
        ValueError: ``seq_len`` is no positive integer, or ``device`` or ``dtype`` is none.

    >>> import torch
    >>> from tmx_compile import TriangleMixConfig, TriangleMixMaskGenerator
    >>> masks = TriangleMixMaskGenerator(TriangleMixConfig(1, 1, 1))
    >>> masks._create_triangle_mask(5, dtype=torch.int64)
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 0, 1, 1, 0],
            [1, 1, 1, 1, 1]])
    >>> masks._create_middle_mask(5).sum()
    tensor(1.)
    """

    def __init__(self, config: TriangleMixConfig) -> None:
        if not isinstance(config, TriangleMixConfig):
            raise ValueError(f"config must be a TriangleMixConfig, got {config!r}")
        self.config = config
        self._cache: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A copied or saved model should not carry N x N tensors that it can rebuild.
        return {**self.__dict__, "_cache": OrderedDict()}

    def should_use_triangle(self, layer_idx: int) -> bool:
        """Whether layer ``layer_idx`` (from 0) is a triangle layer; ``ValueError`` when it is negative.

        >>> from tmx_compile import TriangleMixConfig, TriangleMixMaskGenerator
        >>> TriangleMixMaskGenerator(TriangleMixConfig.deepest(1, num_layers=4)).should_use_triangle(3)
        True
        """
        return self.config.is_triangle_layer(as_count("layer_idx", layer_idx))

    def _create_streaming_mask(
        self, seq_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Sinks and sliding window: keys that every row attends to cheaply."""
        planes = self._sections(seq_len, device, dtype)
        return (planes.causal & planes.near).to(dtype)

    def _create_last_mask(
        self, seq_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """What the last rows attend to beyond sinks and window."""
        planes = self._sections(seq_len, device, dtype)
        return (planes.causal & ~planes.near & planes.last_rows).to(dtype)

    def _create_middle_mask(
        self, seq_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The section that a triangle layer skips."""
        planes = self._sections(seq_len, device, dtype)
        return (planes.causal & ~planes.near & ~planes.last_rows).to(dtype)

    def _create_triangle_mask(
        self, seq_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """What a triangle layer attends to: streaming and last."""
        return self._attended(seq_len, device, dtype, triangle=True).to(dtype)

    def _create_dense_mask(
        self, seq_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The whole causal triangle."""
        return self._attended(seq_len, device, dtype, triangle=False).to(dtype)

    def get_attention_mask(
        self,
        seq_len: int,
        layer_idx: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        use_triangle: bool = False,
    ) -> torch.Tensor:
        """Return the additive (seq_len, seq_len) mask: 0 where attended, -inf elsewhere.

        ``use_triangle`` alone chooses between the triangle and the dense causal mask; ask
        :meth:`should_use_triangle` for what the configuration says about a layer. Every layer shares one
        mask, which stays cached (the few used most recently do): treat the returned tensor as read-only.

        Args:
            seq_len: N, tokens.
            layer_idx: the layer, counted from 0; it plays no part.
            device: of the mask.
            dtype: of the mask; one that holds -inf.
            use_triangle: the triangle mask rather than the dense causal one.

        Raises:
            ValueError: ``seq_len`` is no positive integer, ``layer_idx`` no non-negative one, or ``dtype``
                cannot hold -inf.

        >>> from tmx_compile import TriangleMixConfig, TriangleMixMaskGenerator
        >>> masks = TriangleMixMaskGenerator(TriangleMixConfig(1, 1, 0))
        >>> masks.get_attention_mask(4, layer_idx=0, use_triangle=True)
        tensor([[0., -inf, -inf, -inf],
                [0., 0., -inf, -inf],
                [0., 0., 0., -inf],
                [0., -inf, 0., 0.]])
        """
        seq_len = as_count("seq_len", seq_len, minimum=1)
        as_count("layer_idx", layer_idx)
        device = _as_device(device)
        check_inf_dtype(dtype)
        # "cuda" means whichever device is current; an empty tensor tells which, so that the key says it too.
        device = torch.empty(0, device=device).device
        key = (seq_len, bool(use_triangle), device, dtype, self.config.geometry.counts)
        mask = self._cache.pop(key, None)
        if mask is None:
            # A mask born under inference_mode could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                attended = self._attended(seq_len, device, dtype, triangle=bool(use_triangle))
                mask = torch.zeros(seq_len, seq_len, device=device, dtype=dtype)
                mask.masked_fill_(~attended, float("-inf"))
        # Fake tensors of a tracer must not outlive the trace.
        if type(mask) is torch.Tensor:
            self._cache[key] = mask
        while len(self._cache) > _MAX_CACHED_MASKS:
            with contextlib.suppress(KeyError):  # another thread may have emptied it meanwhile
                self._cache.popitem(last=False)
        return mask

    def clear_cache(self) -> None:
        """Forget every cached mask.

        >>> from tmx_compile import TriangleMixConfig, TriangleMixMaskGenerator
        >>> TriangleMixMaskGenerator(TriangleMixConfig()).clear_cache()
        """
        self._cache.clear()

    def _attended(
        self, seq_len: int, device: torch.device | str, dtype: torch.dtype, *, triangle: bool
    ) -> torch.Tensor:
        planes = self._sections(seq_len, device, dtype)
        return planes.causal & (planes.near | planes.last_rows) if triangle else planes.causal

    def _sections(self, seq_len: int, device: torch.device | str, dtype: torch.dtype) -> _Sections:
        seq_len = as_count("seq_len", seq_len, minimum=1)
        device = _as_device(device)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be a torch.dtype, got {dtype!r}")
        sink, window, last = self.config.geometry.counts
        columns = torch.arange(seq_len, device=device)
        rows = columns.unsqueeze(1)
        # Comparing against a shifted row keeps every (N, N) plane boolean: i - j would be an int64 one.
        near = formula.in_sinks(columns, 0, sink) | (columns >= rows - window)
        last_rows = formula.is_last(rows, seq_len, last)
        return _Sections(causal=formula.causal(rows, columns), near=near, last_rows=last_rows)


class TriangleMixAttention:
    """The mask of each layer of a model with ``num_layers`` layers.

    Attributes:
        config: the configuration.
        num_layers: layers of the model.
        mask_generator: builds the masks, and caches them.

    Raises:
        ValueError: the configuration names a layer that the model does not have.

    >>> from tmx_compile import TriangleMixAttention, TriangleMixConfig
    >>> config = TriangleMixConfig.deepest(1, num_layers=2, min_seq_len=100)
    >>> attention = TriangleMixAttention(config, num_layers=2)
    >>> attention.get_attn_mask(128, layer_idx=0) is None  # dense: no triangle layer
    True
    >>> attention.get_attn_mask(128, layer_idx=1).shape
    torch.Size([128, 128])
    """

    def __init__(self, config: TriangleMixConfig, num_layers: int) -> None:
        self.mask_generator = TriangleMixMaskGenerator(config)
        self.config = config
        self.num_layers = as_count("num_layers", num_layers, minimum=1)
        config.check_layers(self.num_layers)

    def should_use_triangle(self, layer_idx: int) -> bool:
        """Whether ``layer_idx`` is a triangle layer; ``ValueError`` when the model has no such layer.

        >>> from tmx_compile import TriangleMixAttention, TriangleMixConfig
        >>> TriangleMixAttention(TriangleMixConfig.deepest(1, num_layers=2), num_layers=2).should_use_triangle(0)
        False
        """
        layer_idx = as_count("layer_idx", layer_idx)
        if layer_idx >= self.num_layers:
            raise ValueError(f"layer_idx must be less than num_layers={self.num_layers}, got {layer_idx}")
        return self.mask_generator.should_use_triangle(layer_idx)

    def get_attn_mask(
        self,
        seq_len: int,
        layer_idx: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor | None:
        """Return the additive triangle mask (shared, read-only), or None where causal attention stays dense.

        Dense means that ``layer_idx`` is no triangle layer or that ``seq_len`` (tokens) does not exceed
        ``config.min_seq_len``.

        Args:
            seq_len: N, tokens.
            layer_idx: the layer, counted from 0.
            device: of the mask.
            dtype: of the mask; one that holds -inf.

        Returns:
            (N, N): 0 where attended, -inf elsewhere.

        Raises:
            ValueError: as in :meth:`TriangleMixMaskGenerator.get_attention_mask`, also where the answer would be None.

        >>> from tmx_compile import TriangleMixAttention, TriangleMixConfig
        >>> config = TriangleMixConfig(1, 1, 0, triangle_layer_indices=[0], min_seq_len=2)
        >>> TriangleMixAttention(config, num_layers=1).get_attn_mask(4, layer_idx=0)[3]
        tensor([0., -inf, 0., 0.])
        """
        seq_len = as_count("seq_len", seq_len, minimum=1)
        triangle = self.should_use_triangle(layer_idx)
        device = _as_device(device)
        check_inf_dtype(dtype)
        if not triangle or seq_len <= self.config.min_seq_len:
            return None
        return self.mask_generator.get_attention_mask(seq_len, layer_idx, device, dtype, use_triangle=True)


def _as_device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch.device or its name, got {device!r}") from error


def check_inf_dtype(dtype: Any, name: str = "dtype") -> None:
    """Raise ``ValueError`` unless ``dtype`` holds -inf, as an additive mask needs it."""
    if dtype not in _INF_DTYPES:
        names = ", ".join(str(each) for each in _INF_DTYPES)
        raise ValueError(f"{name} must hold -inf, so one of {names}, got {dtype!r}")
