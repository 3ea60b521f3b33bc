"""Compile the Hopper kernel for sm_90 on any machine, and look at the machine code. Run by test_hopper_code.py.

python hopper_code.py '{"dim": 128, "group": 4, "padded": false, "reach": false}'    prints what it found, as JSON
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from tmx_compile.lowering.triton import tuning
from tmx_compile.lowering.triton.hopper import hopper_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_[\w]+):")
# What writes a uniform register, its first operand.
_WRITES = (
    "UIADD3",
    "UMOV",
    "USHF",
    "ULEA",
    "ULOP3",
    "USGXT",
    "UIMAD",
    "R2UR",
    "USEL",
    "ULDC",
    "S2UR",
    "UFLO",
    "UPOPC",
    "UBMSK",
    "UISETP",
    "UPRMT",
    "VOTEU",
    "REDUX",
)


def compiled(dim, group, padded, reach, sink=8, window=512):
    """The kernel as the launch asks for it."""
    registers, consumer, producer = tuning.HOPPER_REGISTERS
    positions = 2 * (64 // triton.next_power_of_2(group))
    found = tuning.choose_hopper(sink, window, positions)
    keys, stages = found.keys, found.stages
    box = triton.next_power_of_2(group)
    block = triton.next_power_of_2(dim)
    shapes = {
        "q_desc": (1, box, 64 // box, block),
        "o_desc": (1, box, 64 // box, block),
        "k_desc": (1, 1, keys, block),
        "v_desc": (1, 1, keys, block),
        "piece_k": (1, 1, 16, 64),
        "piece_v": (1, 1, 16, 64),
    }
    constants = dict(
        HEADS=2 * group, KV_HEADS=2, GROUP=group, HEAD_BOX=box, DIM=dim, BLOCK_D=block, BLOCK_N=keys, STAGES=stages,
        FIRST=found.first, QUERIES=found.queries, MANY_SINKS=sink > found.first, COPY_OUT=group == box,
        PADDED=padded, REACH=reach, WRITE_LSE=padded, CONSUMER_REGISTERS=consumer, PRODUCER_REGISTERS=producer,
    )  # fmt: skip
    pointers = {"out_ptr": "*bf16", "mask_ptr": "*i1", "extent_ptr": "*i32", "counter_ptr": "*i32"}
    names = [parameter.name for parameter in hopper_kernel.params]
    signature, aligned = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in shapes:
            layout = gl.NVMMASharedLayout.get_default_for(list(shapes[name]), gl.bfloat16)
            signature[name] = f"tensordesc<bf16{list(shapes[name])},{layout!r}>"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
            if name.endswith("_ptr"):
                signature[name] = pointers.get(name, "*fp32")
            if name.endswith("_ptr") or name in ("o_batch", "o_head", "o_row", "mask_batch"):
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(
        hopper_kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, maxnreg=registers))


def instructions(sass):
    """(instructions, index of the instruction that each label stands before)."""
    found, labels = [], {}
    for line in sass.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(found)
        elif match := _INSTRUCTION.match(line):
            found.append(match[1])
    return found, labels


def uniform(text):
    return {int(number) for number in re.findall(r"(?<!\w)UR(\d+)", text)}


def effect(instruction):
    """The uniform registers an instruction writes and reads. A pair's second half is counted where it matters."""
    body = re.sub(r"^@!?\w+\s+", "", instruction)
    operation, _, operands = body.partition(" ")
    first, _, rest = operands.partition(",")
    if "HGMMA" in operation:
        base = int(re.search(r"gdesc\[UR(\d+)\]", operands)[1])
        # With the first factor in registers only the second one's descriptor is read.
        halves = (2, 3) if re.match(r"\s*R\d+,\s*R\d+", operands) else range(4)
        return set(), {base + half for half in halves}
    if operation.split(".")[0] in _WRITES and (match := re.match(r"\s*UR(\d+)$", first)):
        register = int(match[1])
        wide = ".64" in operation or "WIDE" in operation
        return {register, register + 1} if wide else {register}, uniform(rest)
    return set(), uniform(operands)


def undefined(sass):
    """Matrix instructions whose descriptor no instruction wrote on some path to them.

    ptxas 12.8 makes such code of some correct programs (see hopper_walk.layout_slots).
    """
    code, labels = instructions(sass)
    effects = [effect(instruction) for instruction in code]
    unset = [None] * len(code)
    unset[0], work = frozenset(range(63)), [0]
    while work:
        index = work.pop()
        after = unset[index] - effects[index][0]
        instruction = code[index]
        jump = re.search(r"BRA.*`\(([^)]+)\)", instruction)
        following = [] if instruction.startswith("EXIT") else [index + 1]
        if jump and jump[1] in labels:
            conditional = instruction.startswith("@") or "UP" in instruction.split("`")[0]
            following = [labels[jump[1]], *([index + 1] if conditional else [])]
        for target in following:
            if target < len(code) and (unset[target] is None or not after <= unset[target]):
                unset[target] = after | (unset[target] or frozenset())
                work.append(target)
    # What descriptors are made from counts too: a move of an unset register is where the fault shows first.
    return [
        text
        for text, (_, reads), missing in zip(code, effects, unset, strict=True)
        if missing and reads & missing and re.search(r"HGMMA|UMOV|UIADD3", text)
    ]


def spills_in_loops(sass):
    """How many instructions of the innermost loops with products go to slow memory."""
    code, labels = instructions(sass)
    loops = []
    for index, instruction in enumerate(code):
        jump = re.search(r"BRA.*`\(([^)]+)\)", instruction)
        start = labels.get(jump[1], index) if jump else index
        # What waits for a barrier lies behind everything, and jumps back without a condition.
        if instruction.startswith("@") and start < index and any("HGMMA" in text for text in code[start:index]):
            loops.append((start, index))
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return sum(bool(re.search(r"\b(STL|LDL)\b", text)) for start, stop in inner for text in code[start:stop]), len(
        inner
    )


def main(settings):
    kernel = compiled(**settings)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        assembled = subprocess.run(
            [TOOLS / "ptxas", "-v", "--gpu-name", "sm_90a", ptx, "-o", Path(folder, "again.cubin")],
            capture_output=True, text=True,
        )  # fmt: skip
        if assembled.returncode:
            raise RuntimeError(f"ptxas: {assembled.returncode}: {assembled.stderr}{assembled.stdout}")
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    messages = assembled.stderr + assembled.stdout
    spills, loops = spills_in_loops(sass)
    return {
        "loops": loops,
        "spills_in_loops": spills,
        "serialized": "serialized" in messages,
        "spilled_bytes": max(int(number) for number in re.findall(r"(\d+) bytes spill", messages)),
        "shared_bytes": kernel.metadata.shared,
        "products": sass.count("HGMMA"),
        "undefined": undefined(sass),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
