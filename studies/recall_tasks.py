"""Synthetic recall at any length: names that are given values, names for names, and lists to repeat.

A sequence is made of slots of four tokens. A *group* is three slots in the order of the sequence, anything between:

    DEF  a  v  .     the name a has the value v
    DEF  b  a  .     b is another name for a
    DEF  c  b  .     c is another name for b

and questions ``ASK x v .`` with x one of a, b, c, after them: 0, 1 or 2 hops from the value. All other slots are noise.
A list of random values may stand in the noise too, and is repeated at the end.

Whoever answers one hop at the question alone needs only the rows at the end of a prompt; whoever looks up ``a`` when
reading ``b is a`` needs rows in its middle. So damage to the Middle section can show, and a single hop shows whether it
is more than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SLOT = 4
HOPS = 3
DEF, ASK, LIST, STOP = 0, 1, 2, 3
NAMES, VALUES, NOISE = 192, 64, 32
_FIRST_NAME = 4
_FIRST_VALUE = _FIRST_NAME + NAMES
_FIRST_NOISE = _FIRST_VALUE + VALUES
VOCABULARY = _FIRST_NOISE + NOISE
LISTED = 32
"""Values of a list."""
IGNORED = -100
"""Target of a position that is not asked, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class Batch:
    """(B, N) token ids, and targets: the token that follows where it can be known, else :data:`IGNORED`.

    ``kind`` (B, N) says what a target asks: the number of hops, 3 for a list, -1 where there is none.
    """

    ids: Tensor
    targets: Tensor
    kind: Tensor


COPY = HOPS


def training(batch: int, tokens: int, generator: torch.Generator, names: int = HOPS, room: int = 16) -> Batch:
    """Questions all over the sequence, one for every name of every group, and a list at the end of each.

    A group has ``names`` of the three names, and on average about ``room`` slots of the sequence or fewer; more where
    names run out.

    Raises:
        ValueError: ``tokens`` is no multiple of four, or too few for a group and a list; or ``names`` is not 1 to 3.
    """
    if not 1 <= names <= HOPS:
        raise ValueError(f"names must be 1 to {HOPS}, got {names}")
    body = _body_slots(tokens, 2 * (LISTED // SLOT + 1))
    # Of few groups one is easily guessed, and a model learns to guess, by elimination too, before it looks up.
    most = min(body // (2 * names), NAMES // HOPS)
    least = max(1, min(body // room, most))
    groups = int(torch.randint(least, most + 1, (1,), generator=generator, device=generator.device))
    slots, order = _noise(batch, tokens, body, generator)
    places = order[:, : groups * 2 * names].reshape(batch, groups, 2 * names).sort(-1).values
    named, values = _named(batch, groups, generator)
    named = named[..., :names]
    kind = torch.full_like(slots, -1)
    _define(slots, places[..., :names], named, values)
    # Which hop each later slot of a group asks: a permutation of all.
    hop = torch.rand(batch, groups, names, generator=generator, device=slots.device).argsort(-1)
    _ask(slots, kind, places[..., names:], named.gather(2, hop), values, hop)
    return _finished(slots, kind, batch, tokens, body, generator)


def evaluation(batch: int, tokens: int, questions: int, hops: int, generator: torch.Generator) -> Batch:
    """Definitions all over the sequence, and its last slots ask for ``questions`` of them, each ``hops`` away.

    ``hops`` = :data:`COPY`: no questions, the list is to be repeated at the end.

    Raises:
        ValueError: as for :func:`training`, or ``hops`` is unknown.
    """
    if not 0 <= hops <= COPY:
        raise ValueError(f"hops must be 0 to {COPY}, got {hops}")
    asked = 0 if hops == COPY else questions
    lists = 2 * (LISTED // SLOT + 1) if hops == COPY else 0
    body = _body_slots(tokens, lists + asked)
    groups = max(asked, 1, min(body // 16, NAMES // HOPS))
    if groups * HOPS > min(NAMES, body):
        raise ValueError(f"{tokens} tokens and {NAMES} names are too few for {questions} questions")
    slots, order = _noise(batch, tokens, body, generator)
    places = order[:, : groups * HOPS].reshape(batch, groups, HOPS).sort(-1).values
    names, values = _named(batch, groups, generator)
    kind = torch.full_like(slots, -1)
    _define(slots, places, names, values)
    if hops == COPY:
        return _finished(slots, kind, batch, tokens, body, generator)
    first = tokens // SLOT - asked
    places = torch.arange(first, first + asked, device=slots.device).expand(batch, asked)[..., None]
    hop = torch.full((batch, asked, 1), hops, device=slots.device)
    _ask(slots, kind, places, names[:, :asked].gather(2, hop), values[:, :asked], hop)
    return _as_batch(slots, kind)


def _body_slots(tokens: int, reserved: int) -> int:
    body = tokens // SLOT - reserved
    if tokens % SLOT or body < 2 * HOPS:
        raise ValueError(
            f"tokens must be a multiple of {SLOT} and at least {SLOT * (reserved + 2 * HOPS)}, got {tokens}"
        )
    return body


def _noise(batch: int, tokens: int, body: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Slots of noise (B, N / 4, 4), and a random order of those of the body (B, body)."""
    device = generator.device
    shape = (batch, tokens // SLOT, SLOT)
    slots = torch.randint(_FIRST_NOISE, VOCABULARY, shape, generator=generator, device=device)
    return slots, torch.rand(batch, body, generator=generator, device=device).argsort(-1)


def _named(batch: int, groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three names for every group, all different in a sequence (B, G, 3), and the values (B, G)."""
    device = generator.device
    order = torch.rand(batch, NAMES, generator=generator, device=device).argsort(-1)
    names = _FIRST_NAME + order[:, : groups * HOPS].reshape(batch, groups, HOPS)
    values = torch.randint(_FIRST_VALUE, _FIRST_NOISE, (batch, groups), generator=generator, device=device)
    return names, values


def _define(slots: Tensor, places: Tensor, names: Tensor, values: Tensor) -> None:
    what = torch.cat([values[..., None], names[..., :-1]], -1)
    written = torch.stack([torch.full_like(names, DEF), names, what, torch.full_like(names, STOP)], -1)
    _write(slots, places, written)


def _ask(slots: Tensor, kind: Tensor, places: Tensor, names: Tensor, values: Tensor, hop: Tensor) -> None:
    value = values[..., None].expand_as(names)
    written = torch.stack([torch.full_like(names, ASK), names, value, torch.full_like(names, STOP)], -1)
    _write(slots, places, written)
    # The value is the token after the name.
    asked = torch.full_like(written, -1)
    asked[..., 1] = hop
    _write(kind, places, asked)


def _write(slots: Tensor, places: Tensor, written: Tensor) -> None:
    batch = slots.shape[0]
    index = places.reshape(batch, -1, 1).expand(-1, -1, SLOT)
    slots.scatter_(1, index, written.reshape(batch, -1, SLOT))


def _finished(slots: Tensor, kind: Tensor, batch: int, tokens: int, body: int, generator: torch.Generator) -> Batch:
    """A list in the reserved slots behind the body, moved to a random place before, and repeated at the end."""
    device = slots.device
    length = LISTED // SLOT + 1
    listed = torch.randint(
        _FIRST_VALUE, _FIRST_NOISE, (batch, LISTED // SLOT, SLOT), generator=generator, device=device
    )
    head = torch.full((batch, 1, SLOT), LIST, device=device)
    both = torch.cat([head, listed], 1)
    place = int(torch.randint(0, body + 1, (1,), generator=generator, device=device))
    front, back = slots[:, :place], slots[:, place:body]
    slots = torch.cat([front, both, back, both], 1)
    nothing = torch.full_like(both, -1)
    asked = nothing.clone()
    # Every value of the repeated list but the first is asked by the one before it.
    asked[:, 1:] = COPY
    asked[:, -1, -1] = -1
    kind = torch.cat([kind[:, :place], nothing, kind[:, place:body], asked], 1)
    assert slots.shape[1] == tokens // SLOT == place + body - place + 2 * length
    return _as_batch(slots, kind)


def _as_batch(slots: Tensor, kind: Tensor) -> Batch:
    ids, kind = slots.flatten(1), kind.flatten(1)
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)
    return Batch(ids, torch.where(kind >= 0, following, IGNORED), kind)
