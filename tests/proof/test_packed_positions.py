"""Position ids that start again with every document."""

import pytest
import torch

from tests.support.masked import CONFIG, causal, check, model_with, numbers, tensors
from tmx_compile import explain
from tmx_compile.report import Reason


def positions_of(document):
    """The position ids of packed documents: counted from 0 in each."""
    place = torch.arange(document.shape[1]).expand_as(document)
    first = torch.where(document.diff(dim=1, prepend=document[:, :1] - 1) != 0, place, 0).cummax(1).values
    return place - first


def packed(q, k, p, step=1, causal_by=None):
    """Documents as the running count of breaks; causality in the position ids themselves."""
    number = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != step).cumsum(-1)
    same = number[:, None, :, None] == number[:, None, None, :]
    return same & (causal(q, k) if causal_by is None else causal_by(p))


PACKED = {
    "causal by place": lambda q, k, p: packed(q, k, p),
    "causal by position": lambda q, k, p: packed(
        q, k, p, causal_by=lambda p: p[:, None, None, :] <= p[:, None, :, None]
    ),
    "causal and windowed by position": lambda q, k, p: packed(
        q,
        k,
        p,
        causal_by=lambda p: (
            (p[:, None, None, :] <= p[:, None, :, None]) & (p[:, None, :, None] - p[:, None, None, :] < 20)
        ),
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PACKED)
def test_documents_given_by_position_ids(name, dynamic, eager):
    document = numbers()
    positions = positions_of(document)
    assert positions[0, 48:56].tolist() == [48, 49, 0, 1, 2, 0, 1, 2]
    check(PACKED[name], tensors(), positions, eager=eager, document=document, dynamic=dynamic)


def test_position_ids_prove_nothing_across_documents(eager):
    """Without the document condition, or with counts of other breaks, a smaller position id is no earlier place."""

    def alone(q, k, p):
        return p[:, None, None, :] <= p[:, None, :, None]

    def by_twos(q, k, p):
        return packed(q, k, p, step=2, causal_by=lambda p: p[:, None, None, :] <= p[:, None, :, None])

    for mask_of in (alone, by_twos):
        torch._dynamo.reset()
        (site,) = explain(model_with(mask_of), *tensors(), positions_of(numbers()), config=CONFIG)
        assert site.decision == "dense"
        assert site.reason in (Reason.POSITIONS_UNKNOWN.name, Reason.MASK_UNKNOWN.name)
