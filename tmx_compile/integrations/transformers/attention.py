"""TriangleMix as an attention implementation of Transformers: sparse layers without ``torch.compile``.

``register_attention(config)`` once, then ``model.set_attn_implementation("tmx")``: from then on Transformers calls
:meth:`TriangleAttention.forward` in every attention layer, with the layer's module and a mask in words.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.comptime import comptime
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tmx_compile.config import TriangleMixConfig
from tmx_compile.errors import StrictModeError
from tmx_compile.integrations.transformers.causal_mask import CausalMask, causal_mask
from tmx_compile.integrations.transformers.dense import dense_attention
from tmx_compile.integrations.transformers.judge import Judge, layer_of
from tmx_compile.integrations.transformers.paged import no_mask, paged_attention
from tmx_compile.integrations.transformers.records import Records
from tmx_compile.layers import is_handed_over, went_sparse
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.lowering.base import AttentionCall, immediate
from tmx_compile.lowering.block_sparse import BlockSparse
from tmx_compile.lowering.chunk import CHUNK, FIRST_LAST_ROW
from tmx_compile.lowering.table import CHUNK_LOWERINGS, Role, Wish, choose
from tmx_compile.mask import Geometry
from tmx_compile.mask.selection import Selection
from tmx_compile.remarks import warn_if_switched_dense, warn_of
from tmx_compile.report import Rejected, Report
from tmx_compile.request import Request


class TriangleAttention:
    """What :func:`register_attention` has registered.

    Attributes:
        name: what ``set_attn_implementation`` takes.
        paged_name: the name that :meth:`batch_continuously` gives. Transformers packs requests without a mask where the
            name has "flash" in it.
        request: what was asked, checked.
        report: one record for each kind of call that each layer has had (long prompt, short prompt, decode step, ...),
            with the shapes of the first; ``graph`` counts the kinds of a layer. The path is the module's class.
        records: what fills the report.

    >>> from tmx_compile import TriangleMixConfig
    >>> from tmx_compile.integrations.transformers import register_attention
    >>> attention = register_attention(TriangleMixConfig.deepest(1, num_layers=2), name="triangle")
    >>> attention.name, len(attention.report)
    ('triangle', 0)
    """

    def __init__(self, name: str, request: Request, report: Report) -> None:
        self.name = name
        self.paged_name = f"flash_{name}"
        self.request = request
        self.report = report
        config = request.config
        self._judge = None if config is None else Judge(request, config)
        self.records = Records(report, Geometry(0, 0, 0) if config is None else config.geometry, config)

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: CausalMask | Tensor | None,
        scaling: float | None = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one layer, as Transformers calls it.

        Args:
            module: the layer's attention; its ``layer_idx`` is the layer's number.
            query: (B, H, Sq, D).
            key: (B, Hkv, Skv, D).
            value: (B, Hkv, Skv, Dv).
            attention_mask: from ``causal_mask`` of this package, or any other.
            scaling: factor on the scores; ``1 / sqrt(D)`` when None.
            settings: whatever else Transformers passes.

        Returns:
            out (B, Sq, H, Dv), and None in place of the weights.

        Raises:
            StrictModeError: in strict mode, where a layer that the configuration names stays dense in a long prompt.
            LoweringError: the lowering chosen by name cannot take the call.

        Warns:
            UserWarning: not in strict mode, where every such layer does.
        """
        if self._judge is None:
            return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **settings)
        if torch.compiler.is_dynamo_compiling() and is_handed_over(module):
            # The backend that has the model does more with plain attention than one node: see tmx_backend.
            return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **settings)
        call = self._judge.call(module, query, key, value, attention_mask, scaling, settings)
        selection = self._judge.selection(module)
        done = call if isinstance(call, Rejected) else self._attend(call, selection)
        if not isinstance(call, Rejected) and not isinstance(done, Rejected):
            out, lowering, visited = done
            # The call's keys: those of a static cache go on behind the prompt.
            self.record(module, call.query, call.key, call.value, attention_mask, lowering)
            if not torch.compiler.is_compiling():
                went_sparse(module)
            if visited is not None and not torch.compiler.is_compiling():
                self.records.visited(type(module).__name__, layer_of(module), lowering, visited)
            return out.transpose(1, 2).contiguous(), None
        assert isinstance(done, Rejected)
        self.record(module, query, key, value, attention_mask, done)
        told = self.request.strict or not torch.compiler.is_compiling()
        if told and self._judge.is_missed(module, done, settings):
            path, layer = type(module).__name__, layer_of(module)
            if self.request.strict:
                raise StrictModeError(f"layer {layer}, {path}: {done}")
            if layer == self._judge.deepest:
                warn_if_switched_dense(self.report, path, layer, done)
        return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **settings)

    def batch_continuously(self, model: nn.Module) -> None:
        """Switch a model to continuous batching: before ``generate_batch`` and its like.

        Each request's prompt, or chunk of a prompt, is judged by its own number of rows, and goes sparse by the plan.
        ``model.set_attn_implementation`` ends it.

        Args:
            model: of Transformers; of one of several parts, the text's part is switched.

        Raises:
            ImportError: a Transformers whose paged cache is called in another way.
        """
        if "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
            raise ImportError("continuous batching needs Transformers 5.23: the paged cache of this one is another")
        # set_attn_implementation would look for a flash kernel of the name.
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        parts = [name for name in config.sub_configs if getattr(config, name, None) is text]
        config._attn_implementation = dict.fromkeys(["", *parts], self.paged_name)

    def forward_paged(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        scaling: float | None = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        """As :meth:`forward`, of requests packed in one sequence; Transformers calls it in continuous batching.

        Args:
            module: the layer's attention.
            query: (1, H, T, D), T tokens of all requests.
            key: (1, Hkv, T, D), before they are put into the cache.
            value: (1, Hkv, T, Dv).
            attention_mask: None; the cache's tables tell what belongs together.
            scaling: factor on the scores.
            settings: whatever else Transformers passes, the cache and its indices among it.
        """
        done: tuple[Tensor, None] = paged_attention(self.forward, module, query, key, value, scaling, settings)
        return done

    def _attend(self, call: AttentionCall, selection: Selection | None) -> tuple[Tensor, str, Tensor | None] | Rejected:
        """The attention (B, H, Sq, Dv), the lowering that computed it, and the blocks it visited where it chose them.

        Or why none takes the call.
        """
        assert self._judge is not None
        request, limit = self.request, self._judge.limit(call.query, call.needs_grad)
        kind = call.query.device.type
        # Other devices (NPUs) have kernels of their own behind the operator.
        one_node = torch.compiler.is_compiling() or kind not in ("cpu", "cuda")
        place = f"{'node' if one_node else 'eager'} {'cuda' if kind == 'cuda' else 'cpu'}"
        role = Role.CHUNK if request.chunked_prefill else Role.PROMPT
        role = Role.DYNAMIC if selection is not None else role
        lowering = choose(place, role, call, Wish(request.lowering, limit, selection=selection))
        if isinstance(lowering, Rejected):
            return lowering
        if isinstance(lowering, BlockSparse):
            out, visited = lowering.attend(call)
            return out, lowering.name, visited
        if role is Role.PROMPT:
            return immediate(lowering, call), lowering.name, None
        q, k, v, key_mask, geometry = call.query, call.key, call.value, call.key_mask, call.geometry
        like = q if key_mask is None else key_mask
        first = FIRST_LAST_ROW(like, None, q.shape[2], k.shape[2], geometry.last, limit, False)
        counts = (*geometry.counts, call.scale, geometry.reach, request.lowering)
        learned = (call.sink_logits, call.softcap) if call.changes else ()
        return CHUNK(q, k, v, key_mask, first, *counts, *learned), lowering.name, None

    def record(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: CausalMask | Tensor | None,
        done: str | Rejected,
    ) -> None:
        """Put a call into the report; while Dynamo traces a model, the call that it is tracing.

        Args:
            module: the layer's attention.
            query: (B, H, Sq, D).
            key: (B, Hkv, Skv, D).
            value: (B, Hkv, Skv, Dv).
            mask: as for :meth:`forward`.
            done: the lowering, or why the call is dense.
        """
        path, layer, name = type(module).__name__, layer_of(module), self.name
        window = mask.window if isinstance(mask, CausalMask) else None
        if isinstance(done, Rejected):
            lowering, reason, detail = "as written", done.reason.name, done.detail
        else:
            lowering, reason, detail = done, "", ""
        if torch.compiler.is_dynamo_compiling():
            _traced(name, path, layer, window, query, key, value, lowering, reason, detail)
        else:
            self.records.add(path, layer, window, query, key, value, lowering, reason, detail)


def _traced(
    name: str,
    path: str,
    layer: int | None,
    window: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lowering: str,
    reason: str,
    detail: str,
) -> None:
    comptime(_record_traced)


def _record_traced(context: Any) -> None:
    """Called by Dynamo where it traces :func:`_traced`, whose arguments are its locals."""
    local = context.get_local
    constants = ("path", "layer", "window", "lowering", "reason", "detail")
    words = {name: local(name).as_python_constant() for name in constants}
    tensors = {name: local(name).as_fake() for name in ("query", "key", "value")}
    registered = ALL_ATTENTION_FUNCTIONS[local("name").as_python_constant()]
    registered.__self__.records.add(**words, **tensors)


def register_attention(
    config: TriangleMixConfig | TriangleMixInferenceConfig,
    *,
    name: str = "tmx",
    report: Report | None = None,
    lowering: str = "auto",
    strict: bool = False,
    chunked_prefill: bool = False,
) -> TriangleAttention:
    """Make TriangleMix an attention implementation: ``model.set_attn_implementation("tmx")`` switches a model to it.

    Nothing has to be compiled. A layer is known by its module's ``layer_idx``. It goes sparse where the configuration
    names it, the prompt is long, and its mask is causal, with padding on either side or a sliding window of the layer's
    own; everything else is what ``attn_implementation="sdpa"`` computes, to the last bit. No mask of all rows and keys
    is made for sparse layers; one for the others is made where ``sdpa`` needs it.

    Args:
        config: which layers go sparse, and the geometry of their mask.
        name: the implementation's name. One that is registered already is replaced, for models that use it too.
        report: a report to fill; a new one by default, found as ``.report`` of the result.
        lowering: "auto", "triton", "blocked" or "operator"; as for :func:`tmx_compile.tmx_backend`. Inside of a model
            that is compiled by whatever backend, "auto" is one node: ``triton`` on CUDA, else ``operator``; "blocked"
            gives that backend its operations. A model that was handed over to ``tmx_backend`` is left to that one.
        strict: raise :class:`tmx_compile.StrictModeError` where a layer that the configuration names stays
            dense in a long prompt.
        chunked_prefill: prompts may come in chunks, announced by :func:`tmx_compile.prefill`; inference only.

    Raises:
        ValueError: an argument of the wrong kind or value, or a name that Transformers uses itself.

    Warns:
        UserWarning: the configuration selects no layer, or the first n layers.

    >>> import torch
    >>> from transformers import Qwen3Config, Qwen3ForCausalLM
    >>> from tmx_compile import TriangleMixConfig
    >>> from tmx_compile.integrations.transformers import register_attention
    >>> sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    >>> model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16))
    >>> attention = register_attention(TriangleMixConfig.deepest(1, num_layers=2, min_seq_len=256))
    >>> model.set_attn_implementation("tmx")
    >>> with torch.no_grad():
    ...     out = model(torch.randint(0, 64, (1, 300)))
    >>> [(site.layer, site.decision) for site in attention.report]
    [(0, 'dense'), (1, 'triangle')]
    """
    if not isinstance(name, str) or not name or "|" in name or "flash" in name:
        raise ValueError(f"name must be a non-empty string without '|' and 'flash', got {name!r}")
    registered = dict(ALL_ATTENTION_FUNCTIONS).get(name)
    if name == "eager" or (registered is not None and not isinstance(_owner(registered), TriangleAttention)):
        raise ValueError(f"name={name!r} is an attention implementation already")
    if lowering not in CHUNK_LOWERINGS:
        raise ValueError(f"lowering must be one of {', '.join(CHUNK_LOWERINGS)}, got {lowering!r}")
    if report is not None and not isinstance(report, Report):
        raise ValueError(f"report must be a tmx_compile.Report, got {report!r}")
    request = Request.of(config, lowering=lowering, strict=strict, chunked_prefill=chunked_prefill)
    warn_of(request, config, stacklevel=2)
    attention = TriangleAttention(name, request, Report() if report is None else report)
    AttentionInterface.register(name, attention.forward)
    AttentionMaskInterface.register(name, causal_mask)
    AttentionInterface.register(attention.paged_name, attention.forward_paged)
    AttentionMaskInterface.register(attention.paged_name, no_mask)
    return attention


def _owner(function: Any) -> Any:
    return getattr(function, "__self__", None)
