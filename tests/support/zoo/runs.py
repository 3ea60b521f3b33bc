"""One model, one implementation, one kind of call: compiled, compared with the oracle, and what became of each site."""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tests.support.zoo.models import VOCABULARY, Model
from tests.support.zoo.oracle import Oracle
from tmx_compile import Report, SiteRecord, TriangleMixConfig, tmx_backend

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
# Not compiled: what ``register_attention`` registers.
SWITCH = "tmx"
TOKENS, BATCH, PADDING, NEW_TOKENS = 100, 2, 30, 3
GEOMETRY = (4, 8, 8)
MIN_SEQ_LEN = 48
ATOL = 2e-4

# {stack of sites: {"triangle", "not found" or the name of a reason: number of sites}}. The stack "causal" holds the
# model's causal self-attention; another is named by its path with * for the number, and has no business going sparse.
Outcome = dict[str, dict[str, int]]
CAUSAL, TRIANGLE, NOT_FOUND = "causal", "triangle", "not found"

# For every model; keys as in ``Model.dense``. Transformers breaks the graph where it makes a block mask, so that the
# numbers of packed sequences, which most models ask for where there is neither a mask nor a cache, come in as data.
DENSE = {"flex_attention, no mask": frozenset({TRIANGLE, "POSITIONS_UNKNOWN"})}


@dataclass(frozen=True)
class Call:
    """A kind of call. ``padding`` is None without a 2-D mask, else how much of the second sequence is padding."""

    name: str
    padding: int | None
    cache: bool | None = None
    generate: bool = False


CALLS: dict[str, Call] = {
    call.name: call
    for call in (
        Call("no mask", None, cache=False),
        Call("no mask, cache", None, cache=True),
        Call("full mask", 0, cache=False),
        Call("full mask, cache", 0, cache=True),
        Call("left padding", PADDING, cache=False),
        Call("left padding, cache", PADDING, cache=True),
        Call("generate", PADDING, generate=True),
    )
}


def calls_of(entry: Model) -> list[Call]:
    """The calls that make sense for a model."""
    if not entry.text:
        return [CALLS["no mask"]]
    if entry.brief:
        return [CALLS["full mask"], CALLS["left padding"]]
    return [call for call in CALLS.values() if entry.generates or not (call.generate or call.cache)]


class Specimen:
    """A model under one implementation, with its oracle.

    Raises:
        ValueError: the class does not offer the implementation.
    """

    def __init__(self, entry: Model, implementation: str) -> None:
        self.entry, self.implementation = entry, implementation
        written = "sdpa" if implementation == SWITCH else implementation
        self.model = entry.build(written)
        self.oracle = Oracle(entry, written)
        self.causal = frozenset(path for path, _ in self.model.named_modules() if entry.is_causal(path))
        self._numbered = {int(re.search(r"\.(\d+)\.", path)[1]): path for path in self.causal}
        layers = set(self._numbered)
        assert bool(self.causal) == bool(entry.causal), f"no module of {entry.name} is called {entry.causal}"
        names = ("num_sink_tokens", "sliding_window_size", "num_last_tokens")
        # An encoder's layers are numbered from 0 too: it is for the pass to leave them alone.
        self.config = TriangleMixConfig(
            triangle_layer_indices=sorted(layers | {0, 1}),
            min_seq_len=MIN_SEQ_LEN,
            **dict(zip(names, GEOMETRY, strict=True)),
        )

    def run(self, call: Call) -> Outcome:
        """Compile and run the call; every number is compared with the oracle.

        Raises:
            AssertionError: a number is wrong, or a site went sparse that is not causal self-attention.
        """
        mask = None if call.padding is None else left_padding(BATCH, TOKENS, call.padding)
        inputs = self.entry.inputs(BATCH, TOKENS, mask)
        if self.implementation == SWITCH:
            with switched(self.model, self.config) as report, torch.no_grad():
                self.check(self.model(**inputs, use_cache=False), inputs | {"use_cache": False}, mask, report)
            return self._outcome(report.sites)
        backend = tmx_backend(self.config, lowering="operator")
        with compiled(self.model, backend), torch.no_grad():
            if call.generate:
                prefill = self._generate(inputs, mask, backend.report)
            else:
                settings = {} if call.cache is None or not self.entry.generates else {"use_cache": call.cache}
                self.check(self.model(**inputs, **settings), inputs | settings, mask, backend.report)
                prefill = len(backend.report)
        return self._outcome(backend.report.sites[:prefill])

    def check(self, got: Any, inputs: dict[str, Any], mask: torch.Tensor | None, report: Report) -> None:
        """Compare what a forward call returned, at the positions that are not padding."""
        with self._masked(mask, report) as oracle:
            want = oracle(**self._precise(inputs))
        if report.triangle():
            with self.oracle.masked(frozenset(), GEOMETRY, mask, MIN_SEQ_LEN) as oracle:
                dense = oracle(**self._precise(inputs))
            changes = zip(self.entry.outputs(dense), self.entry.outputs(want), strict=True)
            assert max((ours[0] - theirs[0]).abs().max() for ours, theirs in changes) > 20 * ATOL
        pairs = zip(self.entry.outputs(got), self.entry.outputs(want), strict=True)
        for (ours, tokens), (theirs, _) in pairs:
            seen = mask.bool() if tokens and mask is not None else slice(None)
            assert_equal(ours[seen], theirs[seen])

    def _generate(self, inputs: dict[str, Any], mask: torch.Tensor | None, report: Report) -> int:
        """Generate, and compare every step with the oracle, which is made to take the same tokens.

        Returns:
            How many sites the prefill had.
        """
        sites: list[int] = []

        def count(row: int, before: torch.Tensor) -> list[int]:
            sites.append(len(report))
            return list(range(VOCABULARY))

        settings = dict(
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
            eos_token_id=None,
        )
        got = generate(self.model, **inputs, **settings, prefix_allowed_tokens_fn=count)
        assert len(got.logits) == NEW_TOKENS

        def taken(row: int, before: torch.Tensor) -> list[int]:
            return [int(got.sequences[row, len(before)])]

        with self._masked(mask, report) as oracle:
            want = generate(oracle, **self._precise(inputs), **settings, prefix_allowed_tokens_fn=taken)
        assert torch.equal(got.sequences, want.sequences)
        for ours, theirs in zip(got.logits, want.logits, strict=True):
            assert ours.shape == (BATCH, VOCABULARY)
            assert_equal(ours, theirs)
        return sites[0]

    def _masked(self, mask: torch.Tensor | None, report: Report) -> contextlib.AbstractContextManager[Any]:
        sparse = frozenset(self._whole_path(site) for site in report.triangle())
        assert sparse <= self.causal, f"not causal self-attention: {sorted(sparse - self.causal)}"
        assert all(site.query[2] > MIN_SEQ_LEN for site in report.triangle())
        return self.oracle.masked(sparse, GEOMETRY, mask, MIN_SEQ_LEN)

    def _precise(self, inputs: dict[str, Any]) -> dict[str, Any]:
        dtype = self.oracle.dtype
        return {name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}

    def _whole_path(self, site: SiteRecord) -> str:
        """After a graph break the recorded path may start at an inner module; the switch tells its class alone."""
        if self.implementation == SWITCH:
            return self._numbered.get(-1 if site.layer is None else site.layer, site.path)
        wholes = [name for name, _ in self.model.named_modules() if f".{name}".endswith(f".{site.path}")]
        if len(wholes) > 1 and site.query[2:3] == (TOKENS,):
            # No other tower has that many tokens; were the guess wrong, so would be the oracle's numbers.
            wholes = [name for name in wholes if name in self.causal]
        return wholes[0] if len(wholes) == 1 else site.path

    def _outcome(self, sites: Sequence[SiteRecord]) -> Outcome:
        found: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for site in sites:
            path = self._whole_path(site)
            stack = CAUSAL if path in self.causal else re.sub(r"\.\d+(?=\.|$)", ".*", path)
            found[stack][TRIANGLE if site.decision == "triangle" else site.reason] += 1
        missing = len(self.causal) - found[CAUSAL].total()
        assert missing >= 0, found
        if missing:
            found[CAUSAL][NOT_FOUND] += missing
        return {stack: dict(sorted(counts.items())) for stack, counts in sorted(found.items()) if counts}


def generate(model: Any, **kwargs: Any) -> Any:
    """``model.generate`` as every model has it: Whisper's own cuts audio into pieces, which is not the matter here."""
    from transformers import GenerationMixin

    return GenerationMixin.generate(model, **kwargs)


def left_padding(batch: int, tokens: int, padding: int) -> torch.Tensor:
    """A 2-D attention mask whose last sequence begins with ``padding`` zeros."""
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, :padding] = 0
    return mask


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to float32's precision, relative to the largest value."""
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours.double(), theirs.double(), atol=ATOL * max(1.0, theirs.abs().max().item()), rtol=0)


@contextlib.contextmanager
def compiled(model: Any, backend: Any, dynamic: bool | None = None) -> Iterator[None]:
    """The model's forward compiled by the backend; what would go to Inductor runs as it is."""
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, dynamic=dynamic)
    try:
        with mock.patch("torch._inductor.compile_fx.compile_fx", lambda gm, *args, **kwargs: gm.forward):
            yield
    finally:
        del model.forward
        torch._dynamo.reset()


@contextlib.contextmanager
def switched(model: Any, config: TriangleMixConfig) -> Iterator[Report]:
    """The model under the package's own attention implementation, and the report that it fills."""
    from tmx_compile.integrations.transformers import register_attention

    with (
        mock.patch.dict(AttentionInterface._global_mapping),
        mock.patch.dict(AttentionMaskInterface._global_mapping),
    ):
        attention = register_attention(config, name=SWITCH, lowering="operator")
        model.set_attn_implementation(SWITCH)
        yield attention.report
    model.set_attn_implementation("sdpa")


def complaint(entry: Model, implementation: str, call: str, outcome: Outcome) -> str:
    """What is wrong with an outcome, or "": every causal site goes sparse unless the model says why not."""
    for stack, counts in outcome.items():
        if stack != CAUSAL and TRIANGLE in counts:
            return f"{stack} is not causal self-attention and went sparse"
    if not entry.causal:
        return ""
    counts = outcome.get(CAUSAL, {})
    keys = (f"{implementation}, {call}", implementation, call, "*")
    reasons = next((table[key] for table in (entry.dense, DENSE) for key in keys if key in table), None)
    if reasons is None:
        return "" if set(counts) <= {TRIANGLE} else f"stayed dense: {counts}"
    return "" if counts and set(counts) <= reasons else f"expected {sorted(reasons)}, found {counts}"
