"""One way for a model to be sparse: which layers, how, and as which configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tmx_compile.config import TriangleMixConfig
from tmx_compile.mask.geometry import Geometry
from tmx_compile.mask.selection import Selection, usual_group


@dataclass(frozen=True)
class DynamicLayers:
    """Layers whose blocks are chosen while they run (docs/dynamic.md).

    Attributes:
        layers: counted from 0.
        shares: of each, in order: how much of the estimated attention it keeps.
        method: how it is estimated: "pooled", "antidiagonal" or "sampled".
        block: rows and keys of a block (tokens).
        group: tokens that the estimate takes together; None: as in a configuration.

    >>> from tmx_compile.analysis import Choice, DynamicLayers
    >>> from tmx_compile.mask import Geometry
    >>> Choice(Geometry(8, 512, 128), (2, 3), dynamic=DynamicLayers((0, 1), (0.8, 0.95))).config().dynamic_share
    (0.8, 0.95)
    """

    layers: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    method: str = Selection.method
    block: int = Selection.block
    group: int | None = None

    def __post_init__(self) -> None:
        if self.group is None:
            object.__setattr__(self, "group", usual_group(self.method, self.block))


@dataclass(frozen=True)
class Choice:
    """One way for a model to be sparse.

    Attributes:
        geometry: sinks, window and last rows, in tokens.
        layers: the sparse layers.
        streaming: whether rows after the prompt see sinks and window alone in those layers (``decode="streaming"``).
        dynamic: the layers whose blocks are chosen while they run. They decode densely.

    Raises:
        ValueError: ``geometry`` or ``dynamic`` is none.

    >>> from tmx_compile.analysis import Choice
    >>> from tmx_compile.mask import Geometry
    >>> Choice(Geometry(sink=8, window=512, last=128), layers=(30, 31)).streaming
    False
    """

    geometry: Geometry
    layers: tuple[int, ...]
    streaming: bool = False
    dynamic: DynamicLayers = DynamicLayers()

    def __post_init__(self) -> None:
        if not isinstance(self.geometry, Geometry):
            raise ValueError(f"geometry must be a tmx_compile.mask.Geometry, got {self.geometry!r}")
        if not isinstance(self.dynamic, DynamicLayers):
            raise ValueError(f"dynamic must be a tmx_compile.analysis.DynamicLayers, got {self.dynamic!r}")

    @classmethod
    def of(cls, config: TriangleMixConfig, *, streaming: bool = False) -> Choice:
        """The choice that a configuration makes: its layers and geometry, and its dynamic layers with their shares.

        Args:
            config: the configuration.
            streaming: as in the class.

        >>> from tmx_compile import TriangleMixConfig
        >>> from tmx_compile.analysis import Choice
        >>> Choice.of(TriangleMixConfig(triangle_layer_indices=[3], dynamic_layer_indices=[1, 2])).dynamic.shares
        (0.95, 0.95)
        """
        layers = config.dynamic_layers()
        ways = [config.selection(layer) for layer in layers]
        words = [(x.method, x.block, x.stride) for x in ways[:1]]
        dynamic = DynamicLayers(layers, tuple(x.share for x in ways), *words[0]) if words else DynamicLayers()
        return cls(config.geometry, config.layers(), streaming, dynamic)

    def config(self) -> TriangleMixConfig:
        """The configuration that makes this choice; ``ValueError`` for layers or shares that none can have."""
        x = self.dynamic
        words: dict[str, Any] = {
            "dynamic_layer_indices": x.layers,
            "dynamic_share": x.shares,
            "dynamic_method": x.method,
            "dynamic_block": x.block,
            "dynamic_group": x.group,
        }
        return TriangleMixConfig(
            *self.geometry.counts, triangle_layer_indices=self.layers, **(words if x.layers or x.shares else {})
        )


@dataclass(frozen=True)
class Continued(Choice):
    """A choice for a prompt whose last tokens are a new turn of a conversation: what came before was a prompt itself.

    Attributes:
        geometry: as in :class:`Choice`.
        layers: likewise.
        streaming: likewise.
        dynamic: likewise; no layer here.
        turn: tokens of the new turn.
        dense_turn: whether its rows attend to everything in the sparse layers too; otherwise the turn has the mask of
            the whole conversation at its own rows: sinks, window, and last rows at its end.

    >>> from tmx_compile.analysis import Continued
    >>> from tmx_compile.mask import Geometry
    >>> Continued(Geometry(8, 512, 128), (30, 31), turn=200).dense_turn
    False
    """

    turn: int = 0
    dense_turn: bool = False
