"""What the plugin did: one record per layer, counters of tokens and steps, lines in the log. No vLLM here."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from tmx_compile.errors import StrictModeError
from tmx_compile.integrations.vllm.layers import LayerFacts, judge, layer_number
from tmx_compile.integrations.vllm.rows import Split
from tmx_compile.integrations.vllm.settings import Settings
from tmx_compile.report import NOTHING_MISSED, Accepted, Reason, Rejected, Report, SiteRecord, spelled
from tmx_compile.version import __version__

# Below vLLM's own logger, so that its settings (VLLM_LOGGING_LEVEL, VLLM_LOGGING_CONFIG_PATH) hold for these lines.
log = logging.getLogger("vllm.trianglemix")

FINE = (*NOTHING_MISSED, Reason.LAYER_UNKNOWN)
"""Strict mode takes it. A layer that has no number here is another model's, a drafter's say."""


class Counts:
    """Counters of one worker process.

    Attributes:
        report: one record per attention layer, as the backend of ``torch.compile`` keeps it for a graph's sites.
        tokens: rows by what became of them in triangle layers: "triangle" or "dense" (last rows, decode, prompts that
            stay dense).
        limit: up to which length prompts stay dense here.
        whole_model: whether all layers of the model are here; False: a stage of a pipeline.
        steps: engine steps by "triangle" (some rows streamed) or the name of the reason why none did.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.limit = settings.config.min_seq_len
        self.whole_model = True
        self.report = Report()
        self.tokens: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        self._clock = clock
        self._told = clock()
        self._shown = (0, 0)

    def layers(self, found: Iterable[LayerFacts], lowering: str, *, whole_model: bool = True) -> None:
        """Record what becomes of the attention layers of this process; log the start-up line.

        Args:
            found: all of them.
            lowering: what computes streaming rows.
            whole_model: whether all layers of the model are here; False: a stage of a pipeline.

        Raises:
            StrictModeError: in strict mode, a triangle layer that has to stay dense, or is not there.
        """
        self.whole_model = whole_model
        sites, numbers = [], set()
        for facts in found:
            answer = judge(facts, self.settings.config)
            numbers.add(layer_number(facts.name))
            sites.append(_record(facts, answer, lowering))
            if isinstance(answer, Rejected) and answer.reason not in FINE:
                self._missed(facts.name, answer)
        self.report.add_graph(sites, [])
        absent = sorted(set(self.settings.config.layers()) - numbers) if whole_model else []
        if absent:
            what = ", ".join(map(str, absent))
            self._missed(f"layers {what}", Rejected(Reason.LAYER_UNKNOWN, "no attention layer has such a number"))
        log.info("%s", self.startup_line(lowering))

    def startup_line(self, lowering: str) -> str:
        """Version, layers, geometry and what computes them, in one line."""
        config, sites = self.settings.config, self.report.sites
        sparse = sorted(site.layer for site in self.report.triangle() if site.layer is not None)
        dense = Counter(site.reason for site in sites if site.decision == "dense")
        here = "" if self.whole_model else " in this stage"
        because = ", ".join(f"{count} {reason}" for reason, count in sorted(dense.items()))
        return (
            f"TriangleMix {__version__}: triangle layers {spelled(sparse)} of {len(sites)}{here}"
            f"{f' (dense: {because})' if because else ''}, geometry {config.geometry}, "
            f"prompts over {self.limit} tokens, computed by {lowering}"
        )

    def step(self, split: Split | None, rows: int, why: Reason | None) -> None:
        """Count one step of the engine.

        Args:
            split: its rows; None: all are dense.
            rows: how many there are.
            why: where none streamed, the reason; None: every prompt's streaming part was done before.
        """
        streamed = 0 if split is None else sum(part.rows - part.last for part in split.streaming)
        self.tokens["triangle"] += streamed
        self.tokens["dense"] += rows - streamed
        self.steps["triangle" if streamed else "decode" if why is None else why.name] += 1
        self._interval()

    def _interval(self) -> None:
        interval, now = self.settings.stats_log_interval, self._clock()
        if not interval or now - self._told < interval:
            return
        shown = (self.tokens["triangle"], self.tokens["dense"])
        if shown != self._shown:
            self._told, self._shown = now, shown
            log.info("%s", str(self))

    def __str__(self) -> str:
        """The counters as one line."""
        steps = ", ".join(f"{count} {name}" for name, count in sorted(self.steps.items()))
        total = max(1, self.tokens.total() if hasattr(self.tokens, "total") else sum(self.tokens.values()))
        share = self.tokens["triangle"] / total
        return (
            f"TriangleMix: {self.tokens['triangle']} triangle tokens, {self.tokens['dense']} dense tokens ({share:.1%} "
            f"triangle), steps: {steps or 'none'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The counters and the layers' records as plain data, ready for JSON."""
        return {"tokens": dict(self.tokens), "steps": dict(self.steps), "sites": self.report.to_dicts()}

    def _missed(self, name: str, why: Rejected) -> None:
        if self.settings.strict:
            raise StrictModeError(f"{name}: {why}")
        log.warning("TriangleMix: %s stays dense: %s", name, why)


def why_dense(longest: int, min_seq_len: int, limit: int) -> Reason | None:
    """Why no row of a step streams: the reason of its longest prompt; None: its rows are last rows and decode steps.

    Args:
        longest: tokens of that prompt.
        min_seq_len: up to which length the configuration keeps prompts dense.
        limit: up to which length they stay dense here.
    """
    if longest > limit:
        return None
    return Reason.SHORT_PROMPT if longest <= min_seq_len else Reason.NOT_FASTER


def _record(facts: LayerFacts, answer: Accepted | Rejected, lowering: str) -> SiteRecord:
    dense = isinstance(answer, Rejected)
    return SiteRecord(
        graph=0,
        path=facts.name,
        layer=layer_number(facts.name),
        query=(),
        key=(),
        value=(),
        dtype=facts.cache_dtype,
        dynamic=True,
        decision="dense" if dense else "triangle",
        reason=answer.reason.name if isinstance(answer, Rejected) else "",
        detail=answer.detail if isinstance(answer, Rejected) else "",
        lowering="as written" if dense else lowering,
        attended_pairs=0,
        causal_pairs=0,
    )
