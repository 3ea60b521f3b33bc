"""What the user asks of the pass, checked once, and who runs the graph that comes out."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, ParamSpec, TypedDict, TypeVar, get_type_hints

import torch

from tmx_compile.config import TriangleMixConfig
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.lowering.context_parallel import Ranks
from tmx_compile.lowering.table import CHUNK_LOWERINGS, LOWERINGS

TARGETS = ("auto", "inductor", "ascend")

_P = ParamSpec("_P")
_T = TypeVar("_T")


class RewriteOptions(TypedDict, total=False):
    """Keyword arguments that hold for a graph by itself; :func:`tmx_compile.tmx_backend` tells what they mean."""

    lowering: str
    strict: bool
    assume_causal: bool


class Options(RewriteOptions, total=False):
    """All keyword arguments of the backend but ``report``."""

    target: str
    compiler_config: Any
    decode: str
    chunked_prefill: bool
    context_parallel: Any


@dataclass(frozen=True)
class Request:
    """What the user asks of the pass. The defaults live here.

    Attributes:
        config: which layers go sparse, and the geometry; None: the configuration is switched off.
        handed_over: whether a model was: its layers carry marks, and what carries none is none of its layers.
    """

    config: TriangleMixConfig | None
    lowering: str = "auto"
    strict: bool = False
    assume_causal: bool = False
    target: str = "auto"
    compiler_config: Any = None
    decode: str = "dense"
    chunked_prefill: bool = False
    context_parallel: Any = None
    handed_over: bool = False

    @classmethod
    def of(cls, config: TriangleMixConfig | TriangleMixInferenceConfig, **options: Any) -> Request:
        """Check what a user gave; ``ValueError`` names what is wrong, and its value."""
        npu = True
        effective: TriangleMixConfig | None
        if isinstance(config, TriangleMixInferenceConfig):
            effective, npu = config.to_trianglemix_config(), config.use_npu_optimization
        elif isinstance(config, TriangleMixConfig):
            effective = config
        else:
            raise ValueError(f"config must be a TriangleMixConfig or TriangleMixInferenceConfig, got {config!r}")
        asked = cls(effective, **options)
        _check_values(asked)
        if not npu and (asked.target == "ascend" or asked.compiler_config is not None):
            raise ValueError(
                f"config has use_npu_optimization=False, and target is {asked.target!r}, "
                f"compiler_config {asked.compiler_config!r}"
            )
        _check_together(asked)
        return asked if npu else cls(effective, **{**options, "target": "inductor"})

    @property
    def sparse(self) -> bool:
        """Whether any layer is to go sparse."""
        return self.config is not None and bool(self.config.layers() or self.config.dynamic_layers())

    @property
    def ranks(self) -> Ranks | None:
        """The processes that hold a prompt together."""
        return None if self.context_parallel is None else Ranks.of(self.context_parallel)

    def __str__(self) -> str:
        """The options that a reader wants to see, as keyword arguments."""
        always = ("lowering", "strict", "assume_causal")
        shown = [f for f in fields(self) if f.name in always or getattr(self, f.name) != f.default]
        names = [f.name for f in shown if f.name not in ("config", "target", "compiler_config")]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _check_values(asked: Request) -> None:
    for name, allowed in (("lowering", LOWERINGS), ("target", TARGETS)):
        if getattr(asked, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(asked, name)!r}")
    for name in ("strict", "assume_causal", "chunked_prefill"):
        if not isinstance(getattr(asked, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(asked, name)!r}")
    if asked.decode not in ("dense", "streaming"):
        raise ValueError(f"decode must be 'dense' or 'streaming', got {asked.decode!r}")

    if asked.context_parallel is not None:
        _check_mesh(asked.context_parallel)


def _check_mesh(mesh: Any) -> None:
    if not torch.distributed.is_available():
        raise ValueError("context_parallel needs a PyTorch with torch.distributed")
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        raise ValueError(f"context_parallel must be a DeviceMesh of one dimension, got {mesh!r}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"context_parallel must be a mesh that this process is in, got {mesh!r}")


def _check_together(asked: Request) -> None:
    target, lowering = asked.target, asked.lowering
    if target == "ascend" and (asked.decode != "dense" or asked.chunked_prefill):
        raise ValueError(
            f"target 'ascend' takes neither streaming decode nor chunked prefill yet, got decode={asked.decode!r}, "
            f"chunked_prefill={asked.chunked_prefill!r}"
        )
    if target == "inductor" and asked.compiler_config is not None:
        raise ValueError(f"compiler_config is torchair's, and target is {target!r}: give target='ascend'")
    if target == "inductor" and lowering == "ascend":
        raise ValueError(f"lowering 'ascend' is compiled by torchair, and target is {target!r}: give target='ascend'")
    if target == "ascend" and lowering not in ("auto", "ascend"):
        raise ValueError(f"lowering {lowering!r} is not for torchair: with target='ascend' it is 'auto' or 'ascend'")
    if asked.context_parallel is not None and asked.config is None:
        raise ValueError("context_parallel needs a configuration that is enabled: without one no attention is split")
    if asked.context_parallel is not None and (target == "ascend" or asked.decode != "dense" or asked.chunked_prefill):
        raise ValueError(
            f"context_parallel takes neither target 'ascend' nor streaming decode nor chunked prefill, got "
            f"target={target!r}, decode={asked.decode!r}, chunked_prefill={asked.chunked_prefill!r}"
        )
    if asked.context_parallel is not None and asked.config is not None and asked.config.dynamic_layers():
        raise ValueError(
            f"context_parallel splits no dynamic layers, got dynamic_layer_indices={asked.config.dynamic_layer_indices}"
        )
    if asked.chunked_prefill and lowering not in CHUNK_LOWERINGS:
        raise ValueError(f"chunked_prefill takes a lowering of {', '.join(CHUNK_LOWERINGS)}, got {lowering!r}")


def takes(kind: type[RewriteOptions]) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Give a function with ``**options`` the signature that ``kind`` and the defaults of :class:`Request` spell out.

    An option of another name is a ``TypeError``, as for any function.
    """
    defaults = {f.name: f.default for f in fields(Request) if f.default is not MISSING}
    types = get_type_hints(kind)
    names = [name for name in defaults if name in types]

    def wrap(function: Callable[_P, _T]) -> Callable[_P, _T]:
        own = inspect.signature(function)
        plain = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        spelled = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=types[name])
            for name in names
        ]
        known = {p.name for p in plain} | set(names)

        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            for name in kwargs:
                if name not in known:
                    raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}")
            return function(*args, **kwargs)

        # On both: what makes the API reference looks behind the wrapper.
        for each in (function, run):
            each.__signature__ = own.replace(parameters=[*plain, *spelled])  # type: ignore[attr-defined]
        return run

    return wrap


class Short(enum.Enum):
    """What happens to prompts of at most ``min_seq_len`` tokens where one graph may get such and longer ones."""

    BESIDE = "another form of the same graph serves them, where its inputs tell the length; else another graph"
    OTHER_GRAPH = "another graph serves them"
    INSIDE = "they are dense inside the graph"
    LEFT_DENSE = "the site stays dense for all lengths"


@dataclass(frozen=True)
class Host:
    """Who runs the graph, and what that allows.

    Attributes:
        name: for messages.
        compiler: "inductor", "torchair", or "" for a graph that is handed back.
        guards: whether somebody checks a guard on a length, so that one may be added.
        short: what happens to short prompts.
    """

    name: str
    compiler: str
    guards: bool
    short: Short

    def place(self, device: torch.device) -> str:
        """The row of the lowerings' table for a tensor's device."""
        if self.compiler != "inductor":
            return "ascend" if self.compiler == "torchair" else "portable"
        return "cuda" if device.type == "cuda" else "cpu"


INDUCTOR = Host("Inductor", "inductor", guards=True, short=Short.BESIDE)
TORCHAIR = Host("torchair", "torchair", guards=True, short=Short.OTHER_GRAPH)
PROGRAM = Host("the program's caller", "", guards=False, short=Short.LEFT_DENSE)
AIR = Host("the .air", "torchair", guards=False, short=Short.INSIDE)
