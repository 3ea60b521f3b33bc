"""torch_npu and its graph compiler torchair: loading them, compiling a graph with them, and writing one to files.

Nothing is imported before it is asked for: without torch_npu the rest of the package works.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from tmx_compile.errors import TriangleMixError
from tmx_compile.graph.calls import named
from tmx_compile.graph.nodes import tensor_of, value_of

_OPERATORS = ("FusedInferAttentionScore", "AttentionUpdate")
_ABOUT_VERSIONS = (*_OPERATORS, "cann version", "CANN version", "upgrade")


def load() -> Any:
    """The module ``torchair``.

    Raises:
        ImportError: torch_npu is not installed or cannot load CANN, with what to do.
    """
    try:
        importlib.import_module("torch_npu")
        return importlib.import_module("torchair")
    except ImportError as error:
        raise ImportError(
            "target 'ascend' needs torch_npu, which brings torchair, of the same version as torch: pip install "
            f"'tmx-compile[npu]'; and CANN in the library path (source its set_env.sh). Importing gave: {error}"
        ) from error


def check_config(compiler_config: Any) -> None:
    """Refuse what is no configuration of torchair's, and a machine without torchair.

    Raises:
        ImportError: as :func:`load`.
        ValueError: another value.
    """
    torchair = load()
    if compiler_config is not None and not isinstance(compiler_config, torchair.CompilerConfig):
        raise ValueError(f"compiler_config must be a torchair.CompilerConfig, got {compiler_config!r}")


def on_npu(gm: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether a graph's tensors are on an NPU."""
    placeholders = (value_of(node) for node in gm.graph.find_nodes(op="placeholder"))
    return any(isinstance(x, Tensor) and x.device.type == "npu" for x in (*example_inputs, *placeholders))


class Torchair:
    """Compiles graphs as ``torch.compile(backend=torchair.get_npu_backend(...))`` does.

    Args:
        compiler_config: a ``torchair.CompilerConfig``: its mode is GE graphs ("max-autotune") by default, or
            "npugraph_ex". None takes the default.
        mode: refused; it is a setting of the configuration.
        options: handed to torchair, which takes some in the mode "npugraph_ex".
    """

    def __init__(self, compiler_config: Any, mode: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        if mode is not None:
            raise ValueError(f"torch.compile's mode is Inductor's, got {mode!r}; set compiler_config.mode instead")
        self._backend = load().get_npu_backend(compiler_config=compiler_config)
        self._options = {"options": dict(options)} if options else {}

    def compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], needed: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """The compiled graph. ``needed``, settings for Inductor, is none of torchair's business.

        Raises:
            TriangleMixError: CANN is too old for an operator, with torchair's message.
        """
        _drop_nothing(gm)
        with _surfaced(), _converted_attention(on_npu(gm, example_inputs)):
            compiled = self._backend(gm, list(example_inputs), **self._options)

        def run(*args: Any) -> Any:
            # GE compiles a graph when it first runs.
            with _surfaced():
                return compiled(*args)

        return run


def _drop_nothing(gm: GraphModule) -> None:
    """Take empty one-dimensional tensors out of concatenations, as ``torch.cat`` does.

    Hugging Face's new caches begin as one. GE's ConcatV2 knows no such rule.
    """
    for node in gm.graph.nodes:
        call = named(node, "cat")
        if call is None or not isinstance(call["tensors"], (list, tuple)):
            continue
        kept = [x for x in call["tensors"] if getattr(tensor_of(x), "shape", None) != (0,)]
        if kept and len(kept) < len(call["tensors"]):
            node.args, node.kwargs = (kept, call["dim"]), {}
    gm.recompile()


@contextlib.contextmanager
def _surfaced() -> Iterator[None]:
    """Say what to do where torchair or CANN complains about an operator of ours; its own message stays."""
    try:
        yield
    except TriangleMixError:
        raise
    except (RuntimeError, AssertionError) as error:
        if not any(words in str(error) for words in _ABOUT_VERSIONS):
            raise
        raise TriangleMixError(
            f"CANN or torch_npu, as installed, cannot do the rewritten attention: it needs {' and '.join(_OPERATORS)} "
            "(Atlas A2 or A3). Install a CANN that fits torch_npu (its release notes list the versions). It says: "
            f"{error}"
        ) from error


def _converted_attention(npu: bool) -> contextlib.AbstractContextManager[Any]:
    """For sites that stay as they are: on a CPU, SDPA becomes an operator without a converter, unless written out."""
    return contextlib.nullcontext() if npu else sdpa_kernel(SDPBackend.MATH)


def _inputs_first(own: Callable[..., Any] | None) -> Callable[..., None]:
    """A pass for torchair that puts all inputs of a graph before its other nodes, after the user's own pass.

    torchair 2.13 replaces the first nodes of the converted graph by the weights, one for each input; it writes a
    dynamic length, which it reads from an input, right behind that input, and so would replace the wrong ones.
    """

    def run(gm: GraphModule, example_inputs: Any, config: Any) -> None:
        if own is not None:
            own(gm, example_inputs, config)
        front = next(iter(gm.graph.nodes))
        for node in gm.graph.find_nodes(op="placeholder"):
            if node is front:
                front = front.next
            else:
                front.prepend(node)

    return run


def write(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rewritten: Callable[[GraphModule, Sequence[Any]], GraphModule],
    folder: str | Path,
    name: str,
    dynamic: bool,
    compiler_config: Any,
) -> Path:
    """What ``torchair.dynamo_export`` does, with ``rewritten`` before the graph is converted: the path of the ``.air``.

    Raises:
        TriangleMixError: torchair did not write the model.
    """
    torchair = load()
    converter = importlib.import_module("torchair._ge_concrete_graph.fx2ge_converter")
    config = torchair.CompilerConfig() if compiler_config is None else copy.deepcopy(compiler_config)
    config.export.export_mode = True
    config.export.export_path_dir = str(folder)
    config.export.export_name = name
    config.export.weight_name = {id(x): n for n, x in (*model.named_buffers(), *model.named_parameters())}
    config.experimental_config.enable_ref_data = True
    config.post_grad_custom_post_pass = _inputs_first(config.post_grad_custom_post_pass.value)
    compiler = Torchair(config)

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compiler.compile(rewritten(gm, example_inputs), example_inputs)

    # One compile per export is meant; it must not use up the user's recompiles. Numbers of the model, an epsilon or a
    # scale, are constants of what is written: as inputs nobody could give them.
    settings = {"recompile_limit": 2**31, "accumulated_recompile_limit": 2**31, "specialize_float": True}
    with torch._dynamo.config.patch(settings), torch.no_grad():
        try:
            torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
        except converter.ExportSuccess:
            return Path(folder) / f"{name}.air"
        except torch._dynamo.exc.BackendCompilerFailed as error:
            # Our own words rather than Dynamo's around them.
            if isinstance(error.inner_exception, TriangleMixError):
                raise error.inner_exception from error.inner_exception.__cause__
            raise
    raise TriangleMixError(f"torchair wrote no model to {folder}: the call of the model left no graph to export")
