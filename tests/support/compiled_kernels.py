"""Compiles Triton's kernels for a GPU that need not be there; prints the names of those that came out, as JSON.

Triton's interpreter runs what its compiler refuses, so the tests there do not show that a kernel compiles.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tmx_compile.lowering.triton import tuning
from tmx_compile.lowering.triton.backward_keys import key_kernel
from tmx_compile.lowering.triton.backward_queries import query_kernel
from tmx_compile.lowering.triton.kernel import triangle_kernel

HEADS = {"HEADS": 8, "KV_HEADS": 2, "GROUP": 4, "DIM": 64, "DIM_V": 64, "BLOCK_D": 64, "BLOCK_DV": 64}
NUMBERS = ("lse", "row_lse", "delta", "part", "lse_grad", "grad_lse")


def compile_for(kernel, capability, shapes, constants):
    """A kernel of bfloat16 tensors, in blocks of ``shapes``."""
    constants = {"BLOCK_M": shapes.rows, "BLOCK_N": shapes.keys, "STAGES": shapes.stages, "FLOAT32": False} | constants
    types = {f"{name}_ptr": "*fp32" for name in NUMBERS}
    types |= {"mask_ptr": "*i1", "extent_ptr": "*i32", "done_ptr": "*i32", "counter_ptr": "*i32", "scale": "fp32"}
    signature = {}
    for name in kernel.arg_names:
        pointer = "*bf16" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, pointer)
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": shapes.warps, "num_stages": shapes.stages}
    triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", capability, 32), options=options)


def main(capability):
    done = []
    for padded in (False, True):
        # With what a layer may do to its scores, and without.
        same = {**HEADS, "PADDED": padded, "REACH": padded, "SOFTCAP": 50.0 if padded else 0.0}
        forward = {"FULL_N": 32, "FULL_STAGES": 2, "WRITE_LSE": padded, "DONE": padded, "SINK_LOGITS": padded}
        compile_for(triangle_kernel, capability, tuning.SMALL, same | forward)
        compile_for(query_kernel, capability, tuning.BACKWARD.queries, same | {"KEY_GROUP": 4, "LSE_GRAD": padded})
        shapes = tuning.BACKWARD.sinks if padded else tuning.BACKWARD.keys
        compile_for(key_kernel, capability, shapes, same | {"SINKS": padded})
        done.append(padded)
    print(json.dumps(done))


if __name__ == "__main__":
    main(int(sys.argv[1]))
