"""How a split prompt scales, by a model of a few measured constants: ``python -m studies.context_scale [RESULTS]``.

One card's time is taken as ``fixed + linear x tokens + square x tokens^2``, fitted to its records. The square part
is that of the dense layers, which heads split evenly; the rest is split by tokens. A collective takes a latency and its
bytes at a rate, fitted to all-to-alls on two cards. Cards beyond one host are assumed to send at a slower rate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS
from studies import context_bytes
from tmx_compile.lowering.context_parallel.heads import share

HOST, BETWEEN_HOSTS = 8, 50e9
"""Cards of one host, and bytes a second that a card sends beyond it (assumed: 400 Gbit/s, not measured)."""

RANKS = (1, 2, 4, 8, 16, 32, 64)
TOKENS = (131072, 262144, 1048576, 4194304, 10485760)


@dataclass(frozen=True)
class Constants:
    """Milliseconds of a model of ``layers`` layers, half of them triangle layers, and of a collective.

    Attributes:
        fixed: of a call.
        linear: of a token.
        square: of a pair of tokens, counted N^2.
        latency: of a collective.
        rate: bytes a millisecond that a process sends.
        layers: the model's.
    """

    fixed: float
    linear: float
    square: float
    latency: float
    rate: float
    layers: int

    def at(self, layers: int) -> Constants:
        """The same layers, more of them."""
        more = layers / self.layers
        return Constants(self.fixed * more, self.linear * more, self.square * more, self.latency, self.rate, layers)


def fitted(content: dict[str, Any]) -> Constants:
    """The constants of a result file of ``studies.context_parallel``."""
    records = content["records"]
    one = [(r["n"], r["ms"]) for r in records if r.get("variant") == "one" and "ms" in r]
    sent = [(r["bytes"], r["ms"]) for r in records if r.get("variant") == "all-to-all"]
    fixed, linear, square = _least_squares(one, lambda n: (1.0, n, n * n))
    # Of what a process hands over, the half of the other one travels.
    latency, per_byte = _least_squares([(n / 2, ms) for n, ms in sent], lambda n: (1.0, n))
    return Constants(fixed, linear, square, latency, 1 / per_byte, content["settings"]["layers"])


def _least_squares(points: Sequence[tuple[float, float]], terms: Any) -> list[float]:
    """Coefficients of least relative error."""
    rows = torch.tensor([[x / y for x in terms(n)] for n, y in points], dtype=torch.float64)
    scale = rows.abs().amax(0)
    found = torch.linalg.lstsq(rows / scale, torch.ones(len(points), 1, dtype=torch.float64)).solution[:, 0] / scale
    return [max(0.0, float(x)) for x in found]


def predicted(
    c: Constants, tokens: int, ranks: int, geometry: tuple[int, int, int], layer: context_bytes.Layer
) -> dict[str, float]:
    """Milliseconds of a prompt and of its collectives, and bytes that a process sends in a layer of each kind."""
    copies, more = share(layer.heads, layer.kv_heads, ranks)
    wider = (layer.kv_heads * copies + more) * (layer.heads // (layer.kv_heads * copies)) / layer.heads
    compute = c.fixed + c.linear * tokens / ranks + c.square * tokens * tokens * wider / ranks
    if ranks == 1:
        return {"ms": compute, "collectives_ms": 0.0, "triangle_bytes": 0.0, "dense_bytes": 0.0}
    rate = c.rate if ranks <= HOST else BETWEEN_HOSTS / 1e3
    filled = context_bytes.Layer(
        round(layer.heads * wider), layer.kv_heads * copies + more, layer.head_dim, layer.itemsize
    )
    dense = context_bytes.heads(filled, ranks, tokens) / ranks
    # The first process sends the sinks to all, the final one its rows to all: the busiest one counts.
    sink, window, last = geometry
    to_all = max(sink * layer.key_bytes, last * layer.row_bytes) * (ranks - 1)
    triangle = to_all + window * layer.key_bytes + last * (layer.row_bytes + 4 * layer.heads)
    half = c.layers / 2
    collectives = half * (2 * c.latency + dense / rate + 2 * c.latency + triangle / rate)
    return {
        "ms": compute + collectives,
        "collectives_ms": collectives,
        "triangle_bytes": triangle,
        "dense_bytes": dense,
    }


def of_record(content: dict[str, Any], record: dict[str, Any]) -> dict[str, float]:
    """What the model says of a record of a result file, with ``share``, that of collectives in the time."""
    return _told(content, fitted(content), record["n"], record["ranks"])


def by_cards(content: dict[str, Any], layers: int) -> dict[int, dict[int, dict[str, float]]]:
    """{tokens: {cards: as :func:`of_record`}} for a model of ``layers`` layers."""
    constants = fitted(content).at(layers)
    return {tokens: {ranks: _told(content, constants, tokens, ranks) for ranks in RANKS} for tokens in TOKENS}


def _told(content: dict[str, Any], constants: Constants, tokens: int, ranks: int) -> dict[str, float]:
    settings = content["settings"]
    sink, window, last = settings["geometry"]
    layer = context_bytes.Layer(settings["heads"], settings["kv_heads"], settings["hidden"] // settings["heads"])
    found = predicted(constants, tokens, ranks, (sink, window, last), layer)
    return {**found, "share": found["collectives_ms"] / found["ms"]}


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    content = json.loads(Path(given[0] if given else RESULTS / "context_parallel.json").read_text(encoding="utf-8"))
    print(fitted(content))
    for item in content["records"]:
        if item.get("variant") == "context" and "ms" in item:
            ms = of_record(content, item)["ms"]
            print(f"{item['n']:>8} tokens, {item['ranks']} cards: {item['ms']:.1f} ms, predicted {ms:.1f}")
    for tokens, found in by_cards(content, 32).items():
        told = ", ".join(f"{ranks}: {each['ms'] / 1e3:.3g} s ({each['share']:.1%})" for ranks, each in found.items())
        print(f"{tokens:>9} tokens, cards: {told}")


if __name__ == "__main__":
    main()
