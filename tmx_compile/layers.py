"""Which attention module of a model is which layer, carried by the module itself.

A traced path names a layer only in a graph of the whole model. Compiled one by one, behind hooks or after a graph
break, a layer's graph says ``L['self'].self_attn``, and Dynamo lets layers share it. So each attention module of a
model that is handed over carries a :class:`~tmx_compile.graph.layer.Mark`, and its ``forward`` reads it: Dynamo guards
on it, and writes it beside every node of the module. The mark tells the *kind* of a layer, not its number, so that
graphs are shared by all layers that are to be alike. After a graph break inside the module itself Dynamo runs it in
pieces that know nothing of the module. Then a torch function mode around them tells each which module it is a part of:
see :class:`Pieces`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.traceback import annotate
from torch.overrides import TorchFunctionMode

from tmx_compile.config import TriangleMixConfig
from tmx_compile.errors import StrictModeError
from tmx_compile.graph.layer import MARK, LayerPath, Mark, placed
from tmx_compile.limit import RecompileLimit
from tmx_compile.report import Report

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)


@dataclass
class Watch:
    """What is said where an attention module runs outside every compiled graph.

    Attributes:
        report: of the backend that the model was handed to.
        longest: prompts of so many tokens stay dense anyway.
        strict: raise instead of warning.
        limit: whether Dynamo goes on compiling.
        off: whether nothing is said any more.
        judged: calls of compiled graphs with attention of layers that are to go sparse. The report tells of each.
    """

    report: Report
    longest: int
    strict: bool
    limit: RecompileLimit
    off: bool = False
    judged: int = 0

    def compiled(self, run: Callable[..., Any], layers: Iterable[LayerPath]) -> Callable[..., Any]:
        """A compiled graph that counts its calls, if there is a layer in it that is marked to go sparse."""
        if not any(layer.mark is not None and layer.mark.sparse for layer in layers):
            return run

        def counted(*args: Any) -> Any:
            self.judged += 1
            return run(*args)

        return counted

    def ran(self, layer: int, tokens: int) -> None:
        """A triangle layer was called with so many rows by Python, not by a compiled graph."""
        if self.off or tokens <= self.longest:
            return
        if not self.report.graphs:
            cause = "the backend has compiled nothing: call model.compile(backend=...) on the module that is run"
        elif self.limit.hit:
            cause = self.limit.hit
        else:
            cause = "a graph break, a hook or a stance (TORCH_LOGS=graph_breaks,recompiles), or a "
            cause += "call of the uncompiled model: where that is meant, backend.allow_uncompiled()"
        text = f"layer {layer} ran uncompiled, dense, on {tokens} tokens; {self.report.graphs} graphs compiled; {cause}"
        if self.strict:
            raise StrictModeError(text)
        # The limit has been told already.
        if not self.report.uncompiled and not self.limit.hit:
            warnings.warn(text, stacklevel=4)
            self.report.notes.append(text)
        self.report.uncompiled += 1


def hand_over(model: nn.Module, config: TriangleMixConfig, watch: Watch) -> None:
    """Mark the attention modules of ``model`` as ``config`` has them; a later call for the same model replaces it.

    Args:
        model: the decoder, or a model that holds one.
        config: which layers go sparse.
        watch: told when a triangle layer runs outside every compiled graph.

    Raises:
        ValueError: ``model`` is no module, has no attention module whose layer can be told, more than one stack of
            them, or not every layer that ``config`` names.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {model!r}")
    found = attention_layers(model)
    present = set(found.values())
    missing = sorted(set(config.layers()) - present)
    if missing:
        raise ValueError(f"config names layers {missing}, and the model has layers {sorted(present)}")
    wanted = frozenset(config.layers())
    plan = plan_of(config)
    kinds = {sparse: tuple(sorted(n for n in present if (n in wanted) == sparse)) for sparse in (True, False)}
    each: Any
    for each, layer in found.items():
        sparse = layer in wanted
        put = each.__dict__.get("forward")
        if not _is_ours(put, each):
            # Over the class's own, or over what somebody put there, as accelerate does.
            each.forward = MethodType(forward if _is_own(put, each) else Over(put), each)
        each._tmx_mark = str(Mark(plan, sparse, kinds[sparse]))
        each._tmx_pieces = Pieces(each._tmx_mark)
        each._tmx_watch = (watch, layer) if sparse else None


def plan_of(config: TriangleMixConfig) -> str:
    """The name of a configuration in its marks."""
    return config.fingerprint()[:16]


def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a marked module. It bears this name so that the bound method can be pickled."""
    return _run(module, type(module).forward, module, *args, **kwargs)


class Over:
    """The forward of a marked module on which somebody else had put one, ``inner``."""

    __name__ = "forward"

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Run it for a module."""
        return _run(module, self.inner, *args, **kwargs)


def _run(module: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        with annotate({MARK: module._tmx_mark}):
            return run(*args, **kwargs)
    with module._tmx_pieces:
        return _watched(module, run, *args, **kwargs)


# Its own frame is not worth a graph, and would get one for every layer.
@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
def _watched(module: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that Python runs, whole or in compiled pieces."""
    if module._tmx_watch is None:
        return run(*args, **kwargs)
    watch, layer = module._tmx_watch
    before = watch.report.switched + watch.judged
    out = run(*args, **kwargs)
    if watch.report.switched + watch.judged == before:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 1), None)
        # Whichever dimension holds the tokens: (B, S, E), (S, B, E) and (B, H, S, D) are all in use.
        watch.ran(layer, 0 if given is None else max(given.shape[:-1]))
    return out


class Pieces(TorchFunctionMode):
    """Nodes of the graphs that Dynamo makes of pieces of a module bear its mark: it traces what the mode does.

    Dynamo guards on the modes that are active, and on the mark. Where nothing is compiled, the mode changes nothing.
    """

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``; while Dynamo traces, under the mark."""
        if torch.compiler.is_compiling():
            with annotate({MARK: self.mark}):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def is_handed_over(module: nn.Module) -> bool:
    """Whether the backend that compiles an attention module knows it: it makes its plain attention sparse then."""
    return hasattr(module, "_tmx_mark")


def went_sparse(module: nn.Module) -> None:
    """Tell the report of the backend that a module was handed to, if any, of an uncompiled call that was sparse."""
    told = getattr(module, "_tmx_watch", None)
    if told is not None:
        told[0].report.switched += 1


def _is_ours(put: Any, module: nn.Module) -> bool:
    ours = isinstance(put, MethodType) and put.__self__ is module
    return ours and (put.__func__ is forward or isinstance(put.__func__, Over))


def _is_own(put: Any, module: nn.Module) -> bool:
    """Whether what stands on the instance is the class's own, as accelerate leaves it when its hooks are removed."""
    return put is None or getattr(put, "__func__", None) is type(module).forward


def attention_layers(model: nn.Module) -> dict[nn.Module, int]:
    """The layer of every self-attention module of a model.

    Transformers' modules say it (``layer_idx``). Where none does, it is read from the modules' names, as the pass reads
    it from a traced path. Modules that say that they are not causal are left out.

    Raises:
        ValueError: no such module, or two stacks of them.
    """
    named = {
        name: module
        for name, module in model.named_modules()
        if name and getattr(module, "is_causal", None) is not False
    }
    numbers = {name: getattr(module, "layer_idx", None) for name, module in named.items()}
    numbered = {name: number for name, number in numbers.items() if isinstance(number, int)}
    # Blocks, experts and mixers may bear the number too: what is called attention is meant, if anything is.
    own = {name: named[name] for name in numbered}
    chosen = _outermost(_called_attention(own) or own)
    if chosen:
        layers = {name: LayerPath(name, _stack(name, numbered[name]), numbered[name]) for name in chosen}
    else:
        chosen = _outermost(_called_attention(named)) or {
            n: m for n, m in named.items() if n.rsplit(".", 1)[-1].isdecimal()
        }
        layers = dict(zip(chosen, placed([tuple(name.split(".")) for name in chosen]), strict=True))
        layers = {name: where for name, where in layers.items() if where.index is not None}
    stacks = sorted({str(where.stack) for where in layers.values()})
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no attention module whose layer can be told")
    if len(stacks) > 1:
        raise ValueError(
            f"model {type(model).__name__} has more than one stack of layers, {', '.join(stacks)}: hand over the "
            "one that is meant, such as model.language_model"
        )
    return {chosen[name]: where.index for name, where in layers.items() if where.index is not None}


def _called_attention(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in modules.items() if _ATTENTION.search(type(module).__name__)}


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Without those that stand inside another of them."""
    return {
        name: module for name, module in modules.items() if not any(name.startswith(f"{other}.") for other in modules)
    }


def _stack(name: str, layer: int) -> str:
    """The path of the list that a module's number counts in."""
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part == str(layer)]
    return ".".join(parts[: places[-1]]) if places else re.sub(r"\d+", "*", name)
