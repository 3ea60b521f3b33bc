"""What differs between an NPU and a CPU that stands in for it when the benchmark is tried out without one."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmx_compile import TmxBackend, TriangleMixConfig, tmx_backend
from tmx_compile.bench.timing import FLUSH_BYTES, Timing, seconds

# The compressed mask that CANN's fused operator wants for its causal and band modes: True = masked.
_MASK_EDGE = 2048
_RIGHT_DOWN_CAUSAL = 3

Compiled = tuple[Callable[..., Any], TmxBackend | None]
"""A compiled module, and our backend where it is the one."""


class Platform(ABC):
    """A device, its dense attention, its ways to compile, and its clock.

    Attributes:
        device: where the tensors are.
        modes: names of the ways to compile a graph.
    """

    device: torch.device
    modes: Sequence[str]

    @abstractmethod
    def dense(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Causal attention of (batch, heads, tokens, head_dim) by the best dense operator; as many keys as rows."""

    @abstractmethod
    def compile(self, module: nn.Module, mode: str, config: TriangleMixConfig | None) -> Compiled:
        """Compile for inference, with triangle layers where there is a configuration."""

    @abstractmethod
    def seconds(self, run: Callable[[], Any]) -> float:
        """Time of one call, on the device's own clock where it has one."""

    @abstractmethod
    def describe(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What hardware and versions there are beside those of the host."""

    def is_dynamic(self, mode: str) -> bool:
        """Whether a mode compiles once for all lengths."""
        return True

    def settle(self) -> None:
        """Let go of what nobody uses any more."""
        gc.collect()

    def peak_gib(self, run: Callable[[], Any]) -> float | None:
        """Peak memory of the device during a call, all that is allocated included; None where nobody counts."""
        return None

    def interleaved(self, runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int) -> dict[str, Timing]:
        """Times of the variants in turn, so that a disturbance meets them all."""
        for run in runs.values():
            for _ in range(warmup):
                run()
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                samples[name].append(self.seconds(run))
        return {name: Timing.of(taken, self.device.type) for name, taken in samples.items()}

    def median(self, run: Callable[[], Any], calls: int) -> tuple[float, list[float]]:
        """Median and all times of a call, in milliseconds."""
        taken = [1e3 * self.seconds(run) for _ in range(calls)]
        return statistics.median(taken), taken


class Cpu(Platform):
    """The same steps with this package's CPU lowerings."""

    device = torch.device("cpu")
    modes = ("inductor",)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    def compile(self, module: nn.Module, mode: str, config: TriangleMixConfig | None) -> Compiled:
        if config is None:
            return torch.compile(module, backend=mode), None
        backend = tmx_backend(config, strict=True)
        return torch.compile(module, backend=backend), backend

    def seconds(self, run: Callable[[], Any]) -> float:
        return seconds(run)

    def describe(self) -> tuple[dict[str, Any], dict[str, str]]:
        return {}, {}


class Npu(Platform):
    """An Ascend NPU through torch_npu.

    Raises:
        RuntimeError: torch_npu is not installed, cannot be imported, or finds no NPU.
    """

    modes = ("max-autotune", "npugraph_ex")

    def __init__(self) -> None:
        if importlib.util.find_spec("torch_npu") is None:
            raise RuntimeError('torch_npu is not installed: pip install "tmx-compile[npu]", and CANN beside it')
        try:
            import torch_npu
        except (ImportError, OSError, RuntimeError) as error:
            raise RuntimeError(f"torch_npu cannot be imported; is CANN's set_env.sh sourced? ({error})") from error
        self._npu: Any = torch_npu
        self._runtime: Any = torch.npu
        if not self._runtime.is_available():
            raise RuntimeError("torch_npu finds no NPU: torch.npu.is_available() is False (see npu-smi info)")
        self.device = torch.device("npu", self._runtime.current_device())
        self._mask = torch.ones(_MASK_EDGE, _MASK_EDGE, dtype=torch.bool, device=self.device).triu_(1)
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self._events = [self._runtime.Event(enable_timing=True) for _ in range(2)]

    def dense(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out: Tensor = self._npu.npu_fused_infer_attention_score(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            atten_mask=self._mask,
            num_heads=query.shape[1],
            num_key_value_heads=key.shape[1],
            scale=scale,
            input_layout="BNSD",
            sparse_mode=_RIGHT_DOWN_CAUSAL,
        )[0]
        return out

    def compile(self, module: nn.Module, mode: str, config: TriangleMixConfig | None) -> Compiled:
        import torchair

        settings = torchair.CompilerConfig()
        settings.mode = mode
        if config is None:
            backend = torchair.get_npu_backend(compiler_config=settings)
            return torch.compile(module, backend=backend), None
        own = tmx_backend(config, target="ascend", compiler_config=settings, strict=True)
        return torch.compile(module, backend=own), own

    def is_dynamic(self, mode: str) -> bool:
        # A captured graph is one of one length.
        return mode == "max-autotune"

    def seconds(self, run: Callable[[], Any]) -> float:
        start, stop = self._events
        # What a variant leaves in the L2 cache must not feed the next; the host also gets ahead of the device here.
        self._flush.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def settle(self) -> None:
        gc.collect()
        self._runtime.synchronize()
        self._runtime.empty_cache()

    def peak_gib(self, run: Callable[[], Any]) -> float | None:
        self._runtime.reset_peak_memory_stats()
        run()
        self._runtime.synchronize()
        return float(self._runtime.max_memory_allocated()) / 2**30

    def describe(self) -> tuple[dict[str, Any], dict[str, str]]:
        properties = self._runtime.get_device_properties(self.device.index)
        hardware = {"npu": properties.name, "npu_memory_gib": round(properties.total_memory / 2**30, 1)}
        versions = {
            "torch_npu": importlib.metadata.version("torch_npu"),
            "cann": str(self._npu.npu.utils.get_cann_version()),
        }
        return hardware, versions
