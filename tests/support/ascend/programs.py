"""Two attention layers, and what each entry makes of them. Runs in the process with torch_npu (see ``standin``)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

from tmx_compile import TriangleMixConfig


class Attend(torch.nn.Module):
    """Grouped attention of a (B, N, 96) tensor: 4 heads and 1 key head of dim 16, causal, perhaps padded."""

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        q, k, v = x[..., :64], x[..., 64:80], x[..., 80:]
        q, k, v = (t.unflatten(2, (-1, 16)).transpose(1, 2) for t in (q, k, v))
        if valid is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            place = torch.arange(x.shape[1])
            mask = (place <= place[:, None]) & valid[:, None, None, :]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


class Layers(torch.nn.Module):
    """A dense layer and a sparse one; what comes out is the sparse one's result."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Attend(), Attend()])
        # Fixes the width where all sizes are dynamic, and is a weight.
        self.gain = torch.nn.Parameter(torch.full((96,), 2.0, dtype=torch.float16), requires_grad=False)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        # As Hugging Face's caches begin.
        x = torch.cat([torch.tensor([], dtype=x.dtype), x * self.gain], 1)
        dense = self.layers[0](x, valid)
        return self.layers[1](torch.cat([dense, x[..., 64:]], 2), valid)


def config(shortest: int = 0) -> TriangleMixConfig:
    """Sinks 3, window 5, last rows 6 in layer 1."""
    return TriangleMixConfig(3, 5, 6, triangle_layer_indices=[1], min_seq_len=shortest)


def tensor(n: int, batch: int = 1) -> torch.Tensor:
    """The input for a length."""
    return torch.randn(batch, n, 96, generator=torch.Generator().manual_seed(n)).half() / 2


def valid(n: int) -> torch.Tensor:
    """Left padding, right padding, a hole, nothing at all."""
    made = torch.ones(4, n, dtype=torch.bool)
    made[0, : n // 3] = False
    made[1, n - n // 4 :] = False
    made[2, n // 2] = n < 3
    made[3] = False
    return made


def types(model: bytes) -> list[str]:
    """The operators of a ModelDef in order, without constants."""
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    return [op.type for op in ModelDef.FromString(model).graph[0].op if op.type != "Const"]


def export(
    folder: Any,
    n: int = 40,
    dynamic: bool = False,
    padded: bool = False,
    lacks: str = "",
    dtype: str = "float16",
    **settings: Any,
) -> tuple[list[str], bytes, list[dict[str, Any]]]:
    """``tmx_compile.export``: the operators, the model, the report."""
    import os

    from torchair._ge_concrete_graph.compat_ir import is_cann_compat

    import tmx_compile
    from tests.support.ascend.standin import capture

    x = tensor(n, 4 if padded else 1).to(getattr(torch, dtype))
    inputs = (x, valid(n)) if padded else (x,)
    is_cann_compat.cache_clear()
    os.environ["STANDIN_CANN_LACKS"] = lacks
    try:
        given = {"config": config(), "strict": True} | settings
        report = tmx_compile.export(Layers().to(x.dtype), *inputs, export_path=folder, dynamic=dynamic, **given)
    finally:
        del os.environ["STANDIN_CANN_LACKS"]
        is_cann_compat.cache_clear()
    model = capture.air(folder)
    return types(model), model, report.to_dicts()


def ge_mode(lengths: tuple[int, ...], **settings: Any) -> tuple[list[list[str]], list[torch.Tensor]]:
    """``torch.compile`` in GE mode: the operators of each graph, and the results, run by the interpreter."""
    import tmx_compile
    from tests.support.ascend.ge.run import execute
    from tests.support.ascend.standin import capture

    backend = tmx_compile.tmx_backend(config(), target="ascend", strict=True, **settings)
    with torch.no_grad(), capture.engine(execute) as models:
        compiled = torch.compile(Layers(), backend=backend)
        outputs = [compiled(tensor(n)) for n in lengths]
    return [types(model) for model in models], outputs


class SeenError(Exception):
    """The graph has been seen."""


def captured(n: int = 40) -> list[str]:
    """``npugraph_ex``: the operators that would be captured."""
    import torchair

    import tmx_compile

    seen: list[str] = []

    def look(gm: Any, inputs: Any, settings: Any) -> None:
        seen.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        raise SeenError

    settings = torchair.CompilerConfig()
    settings.mode = "npugraph_ex"
    settings.post_grad_custom_post_pass = look
    backend = tmx_compile.tmx_backend(config(), target="ascend", strict=True, compiler_config=settings)
    try:
        with torch.no_grad():
            torch.compile(Layers(), backend=backend)(tensor(n))
    except Exception as error:
        if "SeenError" not in repr(error) and "SeenError" not in str(error):
            raise
    return seen


def entry(name: str, **arguments: Any) -> None:
    """Call one of the package's entries with bad arguments."""
    import tmx_compile

    if name == "export":
        given = {"model": Layers(), "config": config(), "export_path": "nowhere"} | arguments
        tmx_compile.export(given.pop("model"), tensor(40), **given)
    else:
        tmx_compile.tmx_backend(config(), **arguments)


def schemas() -> dict[str, str]:
    """The schemas of torch_npu's operators."""
    names = ("npu_fused_infer_attention_score", "npu_attention_update")
    return {name: str(getattr(torch.ops.npu, name).default._schema) for name in names}


def trained(n: int = 40) -> list[dict[str, Any]]:
    """Compile with gradients: the report."""
    import tmx_compile
    from tests.support.ascend.standin import capture

    backend = tmx_compile.tmx_backend(config(), target="ascend")
    x = tensor(n).requires_grad_()
    # What is not rewritten cannot run here; the report is what is asked for.
    with capture.engine(), contextlib.suppress(Exception):
        torch.compile(Layers(), backend=backend)(x)
    return backend.report.to_dicts()


def explained(target: str, n: int = 40) -> list[dict[str, Any]]:
    """``tmx_compile.explain``: the report."""
    import tmx_compile

    with torch.no_grad():
        return tmx_compile.explain(Layers(), tensor(n), config=config(), target=target).to_dicts()
