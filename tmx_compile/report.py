"""What the pass decided and why: one record per attention site, as data, as a table, in the log and in the trace."""

from __future__ import annotations

import enum
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._logging._internal import trace_structured
from torch.fx import Node

log = logging.getLogger("tmx_compile")


class Reason(enum.Enum):
    """Why a site stayed dense. The value is the explanation; docs/reasons.md tells what a user can do.

    >>> from tmx_compile import Reason
    >>> Reason["SHORT_PROMPT"].value
    'the prompt is not longer than min_seq_len'
    """

    NOT_SELECTED = "the configuration keeps this layer dense"
    SHORT_PROMPT = "the prompt is not longer than min_seq_len"
    NOT_FASTER = "dense attention is at least as fast at this length"
    LAYER_UNKNOWN = "the recorded module path names no layer"
    LAYER_AMBIGUOUS = "the recorded module path, or the graph, has more than one candidate for the layer's number"
    FORM = "the call is not written in a form that is understood"
    LAYOUT = "the tensors are not (batch, heads, tokens, head_dim) with key heads dividing query heads"
    DROPOUT = "attention dropout is active"
    SCALE = "the score scale is not known at compile time"
    SCORE_CHANGED = "the scores are changed by more than the scale and the mask"
    WEIGHTS_USED = "the attention weights, or their log-sum-exp, are used beside the result"
    MORE_QUERIES = "there are more query rows than keys, or their order cannot be known"
    TOP_LEFT = "is_causal aligns to the top left, and the numbers of rows and keys are not known to be equal"
    NOT_CAUSAL = "the mask is not causal"
    MASK_UNKNOWN = "the mask depends on data or on an operation that is not understood"
    POSITIONS_UNKNOWN = "the positions of the rows come from data"
    WINDOWED = "the layer's own sliding window is not longer than the triangle's: nothing would be saved"
    FEW_KEYS = "sinks and window hold every key: nothing would be saved"
    FLOAT_BIAS = "the mask adds values other than 0 and minus infinity to the scores"
    WRITTEN_IN_PLACE = "the mask, the scores or an operand is modified in place"
    UNDER_TRANSFORM = "the call is inside torch.vmap or another transform of torch.func"
    NO_LOWERING = "no lowering supports the call"
    NO_DISPATCH = "one graph has to serve lengths on both sides of min_seq_len, and nothing in it tells which"
    KV_CACHE = "a serving engine keeps the layer's keys and values in a form that cannot be read here"
    LENGTH_UNKNOWN = "a serving engine does not tell how long the prompts of a step are"


NOTHING_MISSED = (Reason.SHORT_PROMPT, Reason.NOT_FASTER, Reason.NOT_SELECTED, Reason.FEW_KEYS)
"""Dense, and nothing is missed: strict mode takes it. Every other reason is an error in a long prompt."""


@dataclass(frozen=True)
class Accepted:
    """A yes, with an optional remark."""

    remark: str = ""


@dataclass(frozen=True)
class Rejected:
    """A no: the reason from the closed vocabulary, the particulars, and the node it is about."""

    reason: Reason
    detail: str = ""
    node: Node | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value


@dataclass(frozen=True)
class SiteRecord:
    """One attention call of one compiled graph.

    Shapes hold the lengths that compilation saw (the hints, where a length is dynamic). Pairs are (row, key) pairs of
    one sequence without padding and one head.

    Attributes:
        graph: which compiled graph, counted from 0.
        path: of the module that calls, as the model names it.
        layer: its number, counted from 0; None where the path tells none.
        query: (batch, heads, rows, head_dim).
        key: (batch, key heads, keys, head_dim).
        value: (batch, key heads, keys, value's head_dim).
        dtype: of the query, such as "bfloat16".
        dynamic: whether a length is dynamic.
        decision: "dense", "triangle", "dynamic" (blocks chosen while it runs), or "streaming" (a decode step that
            attends to sinks and window).
        reason: the name of a :class:`Reason` where the site stays dense, else "".
        detail: its particulars; of a sparse site, up to which length the graph serves prompts dense.
        lowering: what computes the call; "as written" where it is left as it is.
        attended_pairs: how many pairs the mask keeps; of a dynamic site at most, see :meth:`Report.density`.
        causal_pairs: how many pairs dense causal attention has.
        layers: the layers that share the graph; as far as ``layer`` is None, those of the model that was handed over.
        method: how a dynamic site estimates what its blocks hold, else "".
        share: how much of it it keeps, else None.

    >>> from tmx_compile import SiteRecord
    >>> shape = (1, 2, 300, 16)
    >>> site = SiteRecord(
    ...     0, "layers.1", 1, shape, shape, shape, "float32", False, "triangle", "", "", "blocked", 25250, 45150
    ... )
    >>> f"{site.attended_pairs / site.causal_pairs:.0%}"
    '56%'
    """

    graph: int
    path: str
    layer: int | None
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: str
    dynamic: bool
    decision: str
    reason: str
    detail: str
    lowering: str
    attended_pairs: int
    causal_pairs: int
    layers: tuple[int, ...] = ()
    method: str = ""
    share: float | None = None


@dataclass
class Report:
    """Every site of every graph that a backend has compiled, in order. Iterate over it; ``print`` shows a table.

    Attributes:
        sites: one record a site.
        notes: remarks about a whole graph.
        graphs: how many graphs were compiled, those without attention too.
        uncompiled: calls of triangle layers of a model that was handed over, on long prompts, outside every compiled
            graph, and so dense.
        switched: such calls that were sparse, because the model runs under ``register_attention`` too.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig, explain
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         return F.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> config = TriangleMixConfig.deepest(1, num_layers=2, min_seq_len=256)
    >>> report = explain(torch.nn.Sequential(Layer(), Layer()), torch.randn(1, 2, 300, 16), config=config)
    >>> len(report), report.graphs, [site.layer for site in report.triangle()]
    (2, 1, [1])
    >>> report.to_dicts()[0]["reason"]
    'NOT_SELECTED'
    """

    sites: list[SiteRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    graphs: int = 0
    uncompiled: int = 0
    switched: int = 0
    _visited: dict[tuple[int, str, int | None], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __iter__(self) -> Iterator[SiteRecord]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def triangle(self) -> list[SiteRecord]:
        """The sites that went sparse, of all graphs.

        >>> from tmx_compile import Report
        >>> Report().triangle()  # empty too where nothing was compiled: see len(report)
        []
        """
        return [site for site in self.sites if site.decision != "dense"]

    def of_graph(self, graph: int) -> list[SiteRecord]:
        """The sites of the compiled graph number ``graph``, counted from 0.

        >>> from tmx_compile import Report
        >>> Report().of_graph(0)
        []
        """
        return [site for site in self.sites if site.graph == graph]

    def density(self, site: SiteRecord) -> float | None:
        """The share of blocks that a dynamic ``site`` visited in its last call; None: not counted, or not run yet.

        Calls write their counts on the device; only this reads them, and waits for it. ``print`` and :meth:`table` do.

        >>> from tmx_compile import Report
        >>> report = Report()
        >>> [report.density(site) for site in report]
        []
        """
        counts = self._visited.get((site.graph, site.path, site.layer))
        if counts is None:
            return None
        visited, causal = counts.tolist()
        return visited / causal if causal else None

    def count_visited(self, graph: int, path: str, layer: int | None, counts: Tensor) -> None:
        """Tell where the calls of a dynamic site count. The backend and the attention implementation call it.

        Args:
            graph: the site's, as in its record.
            path: likewise.
            layer: likewise.
            counts: (2,) blocks visited, and those of dense attention.
        """
        self._visited[graph, path, layer] = counts

    def add_graph(self, sites: list[SiteRecord], notes: Sequence[str], visited: Tensor | None = None) -> None:
        """Record one compiled graph, and tell the log and the structured trace. The backend calls it.

        Args:
            sites: the graph's, in order; ``graph`` of each is the number of graphs so far.
            notes: remarks about the graph; those known already are not repeated.
            visited: where the graph counts for its dynamic sites, in order: (sites, 2) blocks.
        """
        self.graphs += 1
        self.sites.extend(sites)
        if visited is not None:
            for site, counts in zip((s for s in sites if s.decision == "dynamic"), visited, strict=True):
                self.count_visited(site.graph, site.path, site.layer, counts)
        self.notes.extend(note for note in notes if note not in self.notes)
        for note in notes:
            log.warning("%s", note)
        if not sites:
            return
        sparse, dynamic = (sum(site.decision == name for site in sites) for name in ("triangle", "dynamic"))
        more = f", {dynamic} dynamic" if dynamic else ""
        log.info("graph %d: %d attention sites, %d triangle%s", sites[0].graph, len(sites), sparse, more)
        for site in sites:
            _tell(site)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "tmx_compile_report", "encoding": "json"},
            payload_fn=lambda: json.dumps({"sites": [asdict(site) for site in sites], "notes": notes}),
        )

    def add_call(self, site: SiteRecord) -> None:
        """Record one call that was not compiled, and tell the log. The attention implementation calls it.

        Args:
            site: the call.
        """
        self.graphs = max(self.graphs, site.graph + 1)
        self.sites.append(site)
        _tell(site)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The records as plain data, ready for JSON.

        >>> from tmx_compile import Report
        >>> Report().to_dicts()
        []
        """
        return [asdict(site) for site in self.sites]

    def table(self, *, graph: int | None = None, shapes: bool = False) -> Table:
        """A rich table of all graphs or of one, without the tensors' shapes (80 columns) or with them.

        Args:
            graph: which one, counted from 0; None: all.
            shapes: show the shapes of query and key.

        >>> from tmx_compile import Report
        >>> [column.header for column in Report().table().columns]
        ['graph', 'module', 'layer', 'decision', 'lowering', 'pairs', 'why']
        """
        table = Table(title="tmx_compile: attention sites", title_justify="left")
        for name in ("graph", "module", "layer", "query", "key", "decision", "lowering", "pairs", "why"):
            if shapes or name not in ("query", "key"):
                right = name in ("graph", "layer", "pairs")
                table.add_column(name, justify="right" if right else "left", overflow="fold")
        for site in self.sites if graph is None else self.of_graph(graph):
            share = f"{site.attended_pairs / site.causal_pairs:.1%}" if site.causal_pairs else ""
            why = Reason[site.reason].value if site.reason else ""
            if site.decision == "dynamic":
                density = self.density(site)
                share = "" if density is None else f"{density:.1%}"
                why = f"keeps {site.share:.0%} of the mass, {site.method}"
            sizes = ("x".join(map(str, site.query)), "x".join(map(str, site.key))) if shapes else ()
            table.add_row(
                str(site.graph),
                site.path or "?",
                spelled(site.layers or (() if site.layer is None else (site.layer,)), "?"),
                *sizes,
                site.decision,
                site.lowering,
                share,
                ": ".join(filter(None, (why, site.detail))),
            )
        return table

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        # A copied model that was handed over tells the report that the user holds.
        return self

    def __str__(self) -> str:
        console = Console(width=160, record=True, file=io.StringIO(), color_system=None)
        console.print(self.table(shapes=True))
        for note in self.notes:
            console.print(f"note: {note}")
        for count, how in ((self.uncompiled, "dense"), (self.switched, "sparse through the switch")):
            if count:
                console.print(f"calls of triangle layers outside every graph, {how}: {count}")
        return console.export_text()


def spelled(layers: Sequence[int], none: str = "none") -> str:
    """Ascending layer numbers as a short list: ``0,16-31``; ``none`` where there are none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or none


def _tell(site: SiteRecord) -> None:
    log.debug(
        "%s layer=%s %s %s lowering=%s pairs=%d/%d%s",
        site.path,
        site.layer,
        site.query,
        site.decision,
        site.lowering,
        site.attended_pairs,
        site.causal_pairs,
        f" because {site.reason}: {site.detail}" if site.reason else "",
    )
