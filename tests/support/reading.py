"""Terms and proofs of the mask reader, worked out cell by cell in plain Python."""

import torch

from tmx_compile.proof import terms as t
from tmx_compile.proof.conclude import BATCH, HEAD, KEY, ROW


def evaluate(term, point, values):
    """A term at one point by plain Python; ``values`` are the real tensors of opaque nodes."""
    match term:
        case float():
            return term
        case t.Lin(const, factors, elements):
            read = sum(f * evaluate(e, point, values) for e, f in elements)
            return int(const) + sum(f * point[c] for c, f in factors) + read
        case t.Element(node, index):
            return values[node][tuple(evaluate(i, point, values) for i in index)].item()
        case t.Choice(condition, yes, no):
            return evaluate(yes if evaluate(condition, point, values) else no, point, values)
        case t.Const(value):
            return value
        case t.NonNegative(lin):
            return evaluate(lin, point, values) >= 0
        case t.Zero(lin):
            return evaluate(lin, point, values) == 0
        case t.Truthy(element):
            return evaluate(element, point, values) != 0
        case t.Negation(inner):
            return not evaluate(inner, point, values)
        case t.AllOf(terms):
            return all(evaluate(x, point, values) for x in terms)
        case t.AnyOf(terms):
            return any(evaluate(x, point, values) for x in terms)


class Record(torch.fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)
        self.seen = {}

    def run_node(self, node):
        self.seen[node] = super().run_node(node)
        return self.seen[node]


def proven_mask(proof, batch, q_len, kv_len, values):
    """(B, 1, Sq, Skv) bool: what a proof says of every pair."""
    first = kv_len - q_len if proof.offset is None else evaluate(proof.offset, {}, values)
    mask = torch.zeros(batch, 1, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        keys = [{BATCH: b, HEAD: 0, ROW: 0, KEY: j} for j in range(kv_len)]
        valid = [all(evaluate(truth, key, values) for truth in proof.valid) for key in keys]
        number = [evaluate(proof.documents, key, values) if proof.documents else 0 for key in keys]
        for i in range(q_len):
            p = first + i
            for j in range(min(p + 1, kv_len)):
                near = proof.reach is None or p - j <= proof.reach
                mask[b, 0, i, j] = valid[j] and near and number[j] == number[p]
    return mask
