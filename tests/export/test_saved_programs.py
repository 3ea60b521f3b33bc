"""Rewritten programs of real models, and programs that are saved, packaged and run in a fresh process."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.support.layers import CONFIG, Stack
from tests.support.models import masked_oracle, tiny_qwen3
from tests.support.programs import (
    HIGH,
    LENGTHS,
    LOW,
    X,
    close,
    export,
    padded_oracle,
    valid_keys,
    with_padding,
)
from tmx_compile import (
    TriangleMixConfig,
    rewrite,
)


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **heads)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).eval()


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize(
    ("make", "strict", "dynamic", "padded"),
    [
        (tiny_qwen3, False, True, False),
        (tiny_qwen3, True, True, True),
        (tiny_qwen3, True, False, False),
        (tiny_llama, False, True, True),
        (tiny_llama, True, True, False),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_real_models(make, strict, dynamic, padded):
    model, length = make(), Dim("n", min=LOW, max=HIGH)
    args = (torch.randint(0, 128, (2, 150)), torch.ones(2, 150, dtype=torch.int64))[: 2 if padded else 1]
    shapes = tuple({1: length} for _ in args) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(Logits(model), args, dynamic_shapes=shapes, strict=strict)
        for before in (program, program.run_decompositions({})):
            after, report = rewrite(before, CONFIG, strict=True)
            paths = [f"model.model.layers.{i}.self_attn" for i in (0, 1)]
            assert [site.path for site in report] == paths
            assert [site.key[1] for site in report] == [2, 2]
            for n in (LOW, 192) if dynamic else (150,):
                ids, valid = torch.randint(0, 128, (2, n)), valid_keys(n)
                rest = (valid.to(torch.int64),) if padded else ()
                got, want = after.module()(ids, *rest), masked_oracle(model, CONFIG, ids, *rest)
                close(*(x[valid] if padded else x for x in (got, want)))
    # With every row a last row the triangle is the causal mask: the model's own logits.
    whole = TriangleMixConfig(triangle_layer_indices=[0, 1], num_last_tokens=4000, min_seq_len=100)
    with torch.no_grad():
        after, report = rewrite(program, whole, lowering="operator", strict=True)
        assert len(report.triangle()) == 2
        torch.testing.assert_close(after.module()(*args), model(args[0]).logits, atol=2e-5, rtol=0)


_CHILD = """
import sys, torch
folder, operator = sys.argv[1], sys.argv[2] == "operator"
if operator:
    import tmx_compile
cases = torch.load(f"{folder}/cases.pt")
runs = [torch.export.load(f"{folder}/program.pt2").module()]
if not operator:
    runs.append(torch._inductor.aoti_load_package(f"{folder}/package.pt2"))
for run in runs:
    for args, want, valid in cases:
        with torch.no_grad():
            got = run(*args).double()
        keep = valid[:, None].expand(-1, 2, -1)
        torch.testing.assert_close(got[keep], want[keep], atol=2e-5, rtol=0)
assert ("tmx_compile" in sys.modules) == operator
print("ran", len(runs), "programs")
"""


@pytest.mark.parametrize("lowering", ["auto", "operator"])
def test_saved_loaded_and_packaged_programs_run_in_a_fresh_process(lowering, tmp_path):
    """One package for several lengths; only the opaque operator needs this package there."""
    x = torch.randn(X)
    with torch.no_grad():
        program = export(Stack(with_padding), x, valid_keys(150))
        after, report = rewrite(program, CONFIG, lowering=lowering, strict=True)
        assert len(report.triangle()) == 1
        torch.export.save(after, tmp_path / "program.pt2")
        if lowering == "auto":
            torch._inductor.aoti_compile_and_package(after, package_path=str(tmp_path / "package.pt2"))
    cases = []
    for n in LENGTHS:
        x, valid = torch.randn(2, 2, n, 16), valid_keys(n)
        cases.append(((x, valid), padded_oracle(x, valid), valid))
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-c", _CHILD, str(tmp_path), lowering]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"ran {1 if lowering == 'operator' else 2} programs" in done.stdout
