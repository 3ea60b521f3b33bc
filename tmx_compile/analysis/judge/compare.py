"""What sparse layers change in a model's predictions, sequence by sequence, against dense attention.

One run of a prompt with the T tokens that follow it stands for the prefill of the prompt and T decode steps (teacher
forcing): the rows that follow are T more last rows where decoding is dense, and see sinks and window alone in the
sparse layers where it streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tmx_compile.analysis.capture.capture import CapturedModel, Inputs
from tmx_compile.analysis.capture.sections import Piece
from tmx_compile.analysis.choose.direct import divergence
from tmx_compile.analysis.judge.choice import Choice, Continued
from tmx_compile.analysis.judge.language_model import call_arguments
from tmx_compile.config import as_count
from tmx_compile.mask.geometry import ALL_ROWS
from tmx_compile.mask.selection import Selection


@dataclass(frozen=True)
class Outcome:
    """What a run says about one sequence.

    Attributes:
        final: (F, V) log-probabilities of the tokens at the last F places of the prompt.
        following: (T, V) log-probabilities of the tokens that follow it.
        nll_final: mean negative log-likelihood of the former, nats.
        nll_following: of the latter.
        right: the share of the following tokens that is the most likely one.
    """

    final: Tensor
    following: Tensor
    nll_final: float
    nll_following: float
    right: float


@dataclass(frozen=True)
class Change:
    """Dense and sparse on one sequence.

    Attributes:
        kl_final: Kullback-Leibler divergence of the next-token distributions, dense to sparse, nats: the mean over the
            last places of the prompt.
        kl_following: likewise, over the tokens that follow it.
        nll_final: mean negative log-likelihood with sparse layers, nats.
        nll_following: likewise.
        right: the share of the following tokens that is the most likely one with sparse layers.
        dense_nll_final: with dense attention.
        dense_nll_following: likewise.
        dense_right: likewise.
        densities: of each dynamic layer of the choice, in order, the share of blocks that it visited.

    >>> import math
    >>> from tmx_compile.analysis import Change
    >>> change = Change(0.01, 0.02, 2.31, 2.42, 0.5, 2.30, 2.40, 0.5)
    >>> f"perplexity {math.expm1(change.nll_final - change.dense_nll_final):+.1%}"
    'perplexity +1.0%'
    """

    kl_final: float
    kl_following: float
    nll_final: float
    nll_following: float
    right: float
    dense_nll_final: float
    dense_nll_following: float
    dense_right: float
    densities: tuple[float, ...] = ()


def compare(
    captured: CapturedModel, ids: Tensor, choices: Sequence[Choice], *, final: int, following: int
) -> Iterator[Change]:
    """Run a sequence densely and in each way of ``choices``; yields what changes, in their order.

    Only what comes after the first sparse layer is run again for a choice.

    Args:
        captured: a language model that takes ``input_ids`` and returns ``logits``. Its geometry is changed.
        ids: (1, N + T) token ids: a prompt, and what follows.
        choices: the ways.
        final: F, how many of the prompt's last tokens are compared.
        following: T, tokens.

    Raises:
        ValueError: counts that ``ids`` does not hold, a turn that is no part of the prompt, or logits that are not
            finite.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tmx_compile import TriangleMixConfig
    >>> from tmx_compile.analysis import CapturedModel, Choice, compare
    >>> from tmx_compile.mask import Geometry
    >>> shape = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()
    >>> captured = CapturedModel(model, TriangleMixConfig())
    >>> ids = torch.randint(0, 50, (1, 60))
    >>> change, = compare(captured, ids, [Choice(Geometry(2, 6, 5), (1,))], final=8, following=4)
    >>> change.kl_final > 0
    True
    """
    final, following = as_count("final", final, minimum=1), as_count("following", following, minimum=1)
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] <= final + following:
        raise ValueError(
            f"ids must be (1, more than {final} final and {following} following tokens), got shape {tuple(ids.shape)}"
        )
    model = captured.model
    ids = ids.to(next(model.parameters()).device)
    keep = final + following + 1
    inputs = Inputs(kwargs={"input_ids": ids, **call_arguments(model, keep)})
    with torch.no_grad():
        output, trace = captured.trace(inputs)
        dense = _outcome(output, ids, final, following)
        for choice in choices:
            captured.geometry = choice.geometry
            dynamic = _selections(choice, following)
            with captured.pieces(_pieces(choice, ids.shape[1] - following, following)):
                output = captured.rerun(trace, choice.layers, dynamic)
            densities = captured.densities
            change = _change(dense, _outcome(output, ids, final, following))
            yield replace(change, densities=tuple(densities[layer] for layer in dynamic))


def _selections(choice: Choice, following: int) -> dict[int, Selection]:
    """How each dynamic layer chooses. Rows after the prompt attend to everything, as last rows do."""
    if choice.dynamic.layers and isinstance(choice, Continued):
        raise ValueError(f"dynamic must name no layer in a continued conversation, got {list(choice.dynamic.layers)}")
    config = choice.config()
    found = {layer: config.selection(layer) for layer in config.dynamic_layers()}
    return {layer: replace(x, last=min(ALL_ROWS, x.last + following)) for layer, x in found.items()}


def _pieces(choice: Choice, prompt: int, following: int) -> list[Piece]:
    whole = choice.geometry
    found: list[Piece] = []
    if isinstance(choice, Continued):
        turn = as_count("turn", choice.turn, minimum=1)
        if turn >= prompt:
            raise ValueError(f"turn must be less than the prompt's {prompt} tokens, got {turn}")
        found.append((prompt - turn, choice.geometry))
        whole = replace(whole, last=ALL_ROWS) if choice.dense_turn else whole
    if choice.streaming:
        return [*found, (prompt, whole), (prompt + following, replace(whole, last=0))]
    # Rows that decode densely attend to everything, as last rows do.
    return [*found, (prompt + following, replace(whole, last=min(ALL_ROWS, whole.last + following)))]


def _outcome(output: object, ids: Tensor, final: int, following: int) -> Outcome:
    logits: Tensor = output.logits  # type: ignore[attr-defined]
    log_probs = logits[0, -final - following - 1 : -1].float().log_softmax(-1)
    targets = ids[0, -final - following :]
    nll = -log_probs.gather(1, targets[:, None])[:, 0]
    right = log_probs.argmax(-1)[final:] == targets[final:]
    return Outcome(
        log_probs[:final],
        log_probs[final:],
        float(nll[:final].mean()),
        float(nll[final:].mean()),
        float(right.float().mean()),
    )


def _change(dense: Outcome, sparse: Outcome) -> Change:
    return Change(
        divergence(dense.final, sparse.final),
        divergence(dense.following, sparse.following),
        sparse.nll_final,
        sparse.nll_following,
        sparse.right,
        dense.nll_final,
        dense.nll_following,
        dense.right,
    )
