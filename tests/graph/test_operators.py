"""Operators are known by the object they are, and a call means the same however its arguments are written."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from tests.support.layers import OneLayer
from tests.support.reading import evaluate
from tmx_compile import Report, TriangleMixConfig, tmx_backend
from tmx_compile.graph.calls import call_of
from tmx_compile.graph.nodes import op_name
from tmx_compile.graph.operators import name_of, spellings
from tmx_compile.proof.read import MaskReader
from tmx_compile.proof.rules import RULES

N = 150

# Impostors ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("impostor::softmax", mutates_args=())
def softmax_plus_one(x: torch.Tensor, dim: int) -> torch.Tensor:
    e = x.exp()
    return e / (e.sum(dim, keepdim=True) + 1)


@torch.library.custom_op("impostor::matmul", mutates_args=())
def rounded_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.round() @ b.round()


@torch.library.custom_op("impostor::tril", mutates_args=())
def open_tril(x: torch.Tensor) -> torch.Tensor:
    return x.tril(50)


@torch.library.custom_op("impostor::contiguous", mutates_args=())
def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous()


softmax_plus_one.register_fake(lambda x, dim: torch.empty_like(x))
rounded_matmul.register_fake(lambda a, b: a.new_empty(*a.shape[:-1], b.shape[-1]))
open_tril.register_fake(lambda x: torch.empty_like(x))
transposed.register_fake(lambda x: torch.empty_like(x))


@torch.compiler.allow_in_graph
def softmax(x, dim):
    e = x.exp()
    return e / (e.sum(dim, keepdim=True) + 1)


@torch.compiler.allow_in_graph
def tril(x):
    return x.tril(50)


def square():
    return torch.ones(N, N, dtype=torch.bool)


def scores(x):
    return (x @ x.mT * 0.25).masked_fill(square().triu(1), -1e9)


def masked_by(mask_of):
    return lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask_of())


IMPOSTORS = {
    "torch.masked.softmax": lambda x: torch.masked.softmax(scores(x), -1, mask=(torch.arange(N) % 2 == 0)[None]) @ x,
    "custom softmax": lambda x: torch.ops.impostor.softmax(scores(x), -1) @ x,
    "custom matmul": lambda x: (
        torch.ops.impostor.matmul(x, x.mT).mul(0.25).masked_fill(square().triu(1), -1e9).softmax(-1) @ x
    ),
    "custom tril": masked_by(lambda: torch.ops.impostor.tril(square())),
    "custom contiguous": masked_by(lambda: torch.ops.impostor.contiguous(square().triu())),
    "softmax in the graph": lambda x: softmax(scores(x), -1) @ x,
    "tril in the graph": masked_by(lambda: tril(square())),
    "bits of another dtype": masked_by(lambda: square().tril() & (torch.ones(N).view(torch.int32) > 5)[None]),
}


def judged(form, x):
    """What became of the sites, and the compiled result beside eager's; the triangle keeps all that is causal."""
    torch._dynamo.reset()
    report = Report()
    config = TriangleMixConfig(triangle_layer_indices=[0], sliding_window_size=4 * N, min_seq_len=64)
    got = torch.compile(OneLayer(form), backend=tmx_backend(config, report=report))(x)
    return [site.decision for site in report], got, form(x)


@pytest.mark.parametrize("name", IMPOSTORS)
def test_an_impostor_is_never_taken_for_torch(name):
    decisions, got, want = judged(IMPOSTORS[name], torch.randn(1, 2, N, 16))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    # Data of the keys alone is no impostor: it is read as it is.
    assert "triangle" not in decisions or name == "bits of another dtype"


class Odd(torch.Tensor):
    """A tensor class that may override what torch computes."""


def test_a_tensor_class_of_its_own_is_not_known():
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.randn(3, 3).as_subclass(Odd)
    method, function = graph.call_method("softmax", (x, -1)), graph.call_function(torch.softmax, (x, -1))
    assert call_of(method) is None
    assert call_of(function) is None
    assert op_name(method) == "Odd.softmax"
    assert op_name(function) == "softmax of a Odd"
    x.meta["example_value"] = torch.randn(3, 3)
    assert call_of(method)["dim"] == call_of(function)["dim"] == -1


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.masked.softmax, "torch.masked._ops.softmax"),
        (torch.ops.impostor.softmax.default, "impostor::softmax"),
        (torch.ops.prims.transpose.default, "prims::transpose"),
        (operator.concat, "operator.concat"),
        (math.sqrt, "math.sqrt"),
        (max, "builtins.max"),
        (operator.not_, "operator.not_"),
        (torch.linalg.diagonal, "torch._C._linalg.linalg_diagonal"),
        (torch.roll, "roll"),
        (torch.ops.aten.roll.default, "roll"),
        (torch.Tensor.add, "add"),
        (torch.Tensor.__rsub__, "rsub"),
        (operator.iadd, "add_"),
        (torch.ops.aten.add_.Tensor, "add_"),
        (torch.special.softmax, "softmax"),
    ],
)
def test_names(target, name):
    assert name_of(target) == name


# Spellings ------------------------------------------------------------------------------------------------------------

SOURCES = {
    "line": (torch.arange, (4,)),
    "minus one": (torch.arange, (-1, 0)),
    "twos": (torch.full, ((4,), 2)),
    "units": (torch.ones, (4,), {"dtype": torch.int64}),
    "floats": (torch.zeros, (4, 4)),
    "filled": (torch.ones, (4, 4)),
}


class Graphs:
    """A graph with a few tensors that are read, and calls of one operator on them."""

    def __init__(self):
        self.graph = Graph()
        self.named = {name: self.add(*call) for name, call in SOURCES.items()}
        ones = self.add(torch.ones, (4, 4), {"dtype": torch.bool})
        self.named["lower"] = self.add(torch.tril, (ones,))
        self.named["upper"] = self.add(torch.triu, (ones, 1))
        self.named["unit"] = self.add(torch.unsqueeze, (self.named["lower"], 0))

    def add(self, target, args, kwargs=None):
        method = isinstance(target, str)
        make = self.graph.call_method if method else self.graph.call_function
        node = make(target, args, kwargs or {})
        values = torch.fx.node.map_arg((args, kwargs or {}), lambda n: n.meta["example_value"])
        function = getattr(torch.Tensor, target) if method else target
        node.meta["example_value"] = function(*values[0], **values[1])
        return node

    def of(self, arg):
        if isinstance(arg, list):
            return [self.of(x) for x in arg]
        return self.named.get(arg, arg) if isinstance(arg, str) else arg


def each(*names, samples):
    return dict.fromkeys(names, samples)


SHAPED = {"size": (2, 3)}
TWO = [{"input": "line", "other": 2}, {"input": "line", "other": "twos"}]
ONE = [{"input": "lower"}]
NUMBERS = [{"input": "line"}]
SAMPLES = {
    "arange": [{"end": 5}, {"start": 1, "end": 5, "step": 1}, {"start": 1, "end": 9, "step": 2}],
    "iota": [
        {
            "length": 5,
            "start": 1,
            "step": 2,
            "dtype": torch.int64,
            "device": torch.device("cpu"),
            "requires_grad": False,
        }
    ],
    "tensor": [{"data": 3}],
    "scalar_tensor": [{"s": 3}],
    "full": [{"size": (2, 3), "fill_value": 7}],
    "new_full": [{"input": "line", "size": (2, 3), "fill_value": 7}],
    "full_like": [{"input": "line", "fill_value": 7}],
    **each("ones", "zeros", samples=[SHAPED]),
    **each("new_ones", "new_zeros", samples=[{"input": "line", **SHAPED}]),
    **each("ones_like", "zeros_like", samples=NUMBERS),
    **each("add", "sub", "rsub", samples=[*TWO, {"input": "line", "other": "twos", "alpha": 1}]),
    **each("mul", "ge", "gt", "le", "lt", "eq", "ne", samples=TWO),
    "neg": NUMBERS,
    **each("and", "or", "xor", samples=[{"input": "lower", "other": "upper"}]),
    "not": ONE,
    "where": [{"condition": "lower", "input": "filled", "other": "floats"}],
    "masked_fill": [{"input": "floats", "mask": "lower", "value": 2.0}],
    **each("tril", "triu", samples=[{"input": "filled", "diagonal": 1}, {"input": "filled", "diagonal": 0}]),
    "diff": [{"input": "line", "n": 1, "dim": -1, "prepend": "minus one", "append": None}],
    "cat": [{"tensors": ["minus one", "line"], "dim": 0}],
    "cumsum": [{"input": "units", "dim": 0}],
    "to": [
        {"input": "line", "dtype": torch.int32},
        {"input": "line", "dtype": torch.int32, "layout": torch.strided, "device": "cpu", "pin_memory": False},
        {"input": "line", "target": (torch.float32,)},
        {"input": "line", "target": ("cpu", torch.bool)},
    ],
    **each("_to_copy", "convert_element_type", "type", samples=[{"input": "line", "dtype": torch.float32}]),
    "type_as": [{"input": "line", "other": "floats"}],
    **each("bool", "int", "long", "float", "double", "half", "bfloat16", samples=NUMBERS),
    **each("contiguous", "clone", "detach", "detach_copy", "alias", "alias_copy", samples=ONE),
    **each("lift_fresh", "lift_fresh_copy", samples=ONE),
    **each("expand", "expand_copy", "broadcast_to", samples=[{"input": "line", "size": (3, 4)}]),
    "expand_as": [{"input": "line", "other": "floats"}],
    **each("view", "view_copy", "_unsafe_view", samples=[{"input": "lower", "size": (1, 4, 4)}]),
    "reshape": [{"input": "lower", "shape": (1, 4, 4)}],
    **each("view_as", "reshape_as", samples=[{"input": "lower", "other": "unit"}]),
    **each("unsqueeze", "unsqueeze_copy", samples=[{"input": "lower", "dim": 1}]),
    **each("squeeze", "squeeze_copy", samples=[{"input": "unit", "dim": 0}, {"input": "unit"}]),
    "flatten": [{"input": "unit", "start_dim": 0, "end_dim": 1}],
    "unflatten": [{"input": "lower", "dim": 0, "sizes": (1, 4)}],
    **each("permute", "permute_copy", samples=[{"input": "unit", "dims": (2, 0, 1)}]),
    **each("transpose", "transpose_copy", samples=[{"input": "unit", "dim0": 0, "dim1": -1}]),
    **each("t", "numpy_T", "mT", "mH", "matrix_H", samples=ONE),
    "getitem": [{"input": "lower", "index": (slice(-2, None), None, slice(1, None, 2))}],
    "slice": [{"input": "lower", "dim": 0, "start": -2, "end": None, "step": 1}],
    "narrow": [{"input": "lower", "dim": 0, "start": 1, "length": 2}],
    "select": [{"input": "lower", "dim": 1, "index": -1}],
    "index": [{"input": "lower", "indices": ["line"]}],
}


def targets(key, name):
    """What to call for an object (or qualified name) of the table: a function, or a method's name as a string."""
    if not isinstance(key, str):
        bare = getattr(key, "__name__", "")
        yield key
        if getattr(torch.Tensor, bare, None) is key:
            yield bare
        return
    home, _, bare = key.partition("::")
    if home == "attribute":
        yield lambda x: getattr(x, bare)
        return
    packet = getattr(getattr(torch.ops, home), bare, None)
    for overload in packet.overloads() if packet is not None else ():
        if not {"out", "Dimname"} & {overload, overload.split("_")[0]}:
            yield getattr(packet, overload)


def layouts(signature, target, sample):
    """Positions and keywords that say a sample: by place, by name, and without what is the default anyway."""
    if set(sample) - {p.name for p in signature.parameters}:
        return
    if isinstance(target, torch._ops.OpOverload):
        given = {}
        for argument in target._schema.arguments:
            known = next((p for p in signature.parameters if argument.name in p.names), None)
            if known is not None and known.name in sample:
                given[argument.name] = sample[known.name]
        yield (), given
        places = [a.name for a in target._schema.arguments if not a.kwarg_only]
        while places and places[-1] not in given:
            places.pop()
        if all(name in given for name in places):
            yield tuple(given[name] for name in places), {n: v for n, v in given.items() if n not in places}
        return
    places = [p for p in signature.parameters if p.how != "keyword"]
    keywords = {p.name: sample[p.name] for p in signature.parameters if p.how == "keyword" and p.name in sample}
    given = [p for p in places if p.name in sample]
    if given == places[: len(given)]:
        args = [sample[p.name] for p in given]
        yield tuple(args), keywords
        if given and given[-1].how == "rest" and isinstance(args[-1], tuple):
            yield (*args[:-1], *args[-1]), keywords
    # A method's tensor always stands first.
    for first in (0, 1):
        held = [sample[p.name] for p in given[:first]]
        yield tuple(held), {p.name: sample[p.name] for p in given[first:]} | keywords
        short = {p.name: sample[p.name] for p in given[first:] if p.required or sample[p.name] != p.default}
        yield tuple(held), short | keywords
    yield (), {p.names[-1]: sample[p.name] for p in given} | keywords


def non_negative(lin):
    return isinstance(lin.const, int) and lin.const >= 0 and not lin.atoms and all(f > 0 for _, f in lin.factors)


def agrees(node):
    """Whether a rule reads a node, as what it is at every point."""
    value = node.meta["example_value"]
    term = MaskReader(RULES, non_negative).ruled(node)
    for index in torch.cartesian_prod(*map(torch.arange, (1, *value.shape))).reshape(-1, value.dim() + 1).tolist():
        point = {value.dim() - 1 - d: i for d, i in enumerate(index[1:])}
        # A coordinate of a dimension of size 1 may be left in the term: it is 0.
        point = {**dict.fromkeys(range(8), 0), **point}
        assert evaluate(term, point, {}) == value[tuple(index[1:])].item(), (node, index, term)


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_spelling_is_read_as_what_it_is(name):
    """The table says which spellings there are; torch says which of the layouts it takes."""
    read = set()
    graphs = Graphs()
    for known, key, what in spellings():
        if known != name:
            continue
        for target in targets(key, name):
            for signature in what.signatures:
                for sample in SAMPLES[name]:
                    for args, kwargs in layouts(signature, target, sample):
                        args, kwargs = graphs.of(list(args)), {k: graphs.of(v) for k, v in kwargs.items()}
                        if isinstance(target, str) and not (args and isinstance(args[0], Node)):
                            continue
                        try:
                            node = graphs.add(target, tuple(args), kwargs)
                        except (TypeError, RuntimeError, NotImplementedError):
                            continue
                        if not torch.is_tensor(node.meta["example_value"]):
                            continue  # a reflected method that does not take it
                        if isinstance(key, str) and key.startswith("attribute"):
                            node.target, node.args = getattr, (*node.args, key.partition("::")[2])
                        agrees(node)
                        read.add(key)
    missed = {
        key for known, key, _ in spellings() if known == name and next(targets(key, name), None) is not None
    } - read
    assert read
    assert not missed, f"no layout of {missed} was taken"


def test_the_samples_are_of_every_rule():
    assert set(SAMPLES) == set(RULES)


def test_arguments_that_do_not_fit_are_not_understood():
    graphs = Graphs()
    lower, line = graphs.named["lower"], graphs.named["line"]
    refused = [
        graphs.graph.call_function(torch.tril, (lower,), {"offset": 1}),
        graphs.graph.call_function(torch.tril, (lower, 1), {"diagonal": 1}),
        graphs.graph.call_function(torch.ge, (line,)),
        graphs.graph.call_function(torch.where, (lower,)),
        graphs.graph.call_method("view", (line, torch.float64)),
        graphs.graph.call_method("type", (line,)),
        graphs.graph.call_function(torch.add, (line, line), {"out": line}),
    ]
    assert [call_of(node) for node in refused] == [None] * len(refused)
    doubled = graphs.add(torch.add, (line, line), {"alpha": 2})
    assert call_of(doubled)["alpha"] == 2
    assert MaskReader(RULES, non_negative).read(doubled).term.atoms, "alpha is not handled, so it is opaque"
