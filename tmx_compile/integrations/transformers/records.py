"""The report of calls that nothing compiles: a record for each kind of call of a layer, not one for each call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tmx_compile.config import TriangleMixConfig
from tmx_compile.mask import Geometry, pair_counts
from tmx_compile.passes.lengths import hint
from tmx_compile.report import Report, SiteRecord


class Records:
    """Fills a report.

    A layer's calls of one kind (long prompts, say, or decode steps) differ in nothing but lengths: the first is
    recorded. Its graph is the number of kinds that the layer had before.
    """

    def __init__(self, report: Report, geometry: Geometry, config: TriangleMixConfig | None = None) -> None:
        self._report, self._geometry, self._config = report, geometry, config
        self._seen: dict[tuple[str, int | None], list[tuple[str, str, str]]] = {}

    def visited(self, path: str, layer: int | None, lowering: str, counts: Tensor) -> None:
        """Tell what a dynamic layer's call visited: (2,) blocks, and those of dense attention."""
        graph = self._seen[path, layer].index((lowering, "", ""))
        self._report.count_visited(graph, path, layer, counts)

    def add(
        self,
        path: str,
        layer: int | None,
        window: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lowering: str,
        reason: str = "",
        detail: str = "",
    ) -> None:
        """Record a call of real or fake tensors: sparse by a lowering, or dense for a reason (its name).

        ``window`` is the layer's own sliding window in keys, where it has one.
        """
        kinds = self._seen.setdefault((path, layer), [])
        kind = lowering, reason, detail
        if kind in kinds:
            return
        kinds.append(kind)
        shapes = [tuple(hint(size) for size in x.shape) for x in (query, key, value)]
        geometry = replace(self._geometry, reach=None if window is None else window - 1)
        config, selection = self._config, None
        if not reason and config is not None and layer is not None and layer in config.dynamic_layers():
            selection = config.selection(layer)
        geometry = geometry if selection is None else geometry.as_dense()
        attended, causal = pair_counts(geometry, shapes[0][2], shapes[1][2])
        self._report.add_call(
            SiteRecord(
                graph=len(kinds) - 1,
                path=path,
                layer=layer,
                query=shapes[0],
                key=shapes[1],
                value=shapes[2],
                dtype=str(query.dtype).removeprefix("torch."),
                dynamic=any(isinstance(size, torch.SymInt) for x in (query, key, value) for size in x.shape),
                decision="dense" if reason else "triangle" if selection is None else "dynamic",
                reason=reason,
                detail=detail,
                lowering=lowering,
                attended_pairs=causal if reason else attended,
                causal_pairs=causal,
                method="" if selection is None else selection.method,
                share=None if selection is None else selection.share,
            )
        )
