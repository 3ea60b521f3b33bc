"""The command ``tmx calibrate``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tmx_compile.analysis.calibration import Calibration
from tmx_compile.analysis.estimate import ESTIMATORS, calibrate
from tmx_compile.analysis.language_model import load, prompts, read_texts
from tmx_compile.analysis.sections import MEASURES
from tmx_compile.config import TriangleMixConfig

_DTYPES = ("float32", "bfloat16", "float16")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="folder or name of a causal language model of Transformers")
    add("--gguf-file", metavar="FILE", help="the file in the model's folder, for weights in GGUF")
    add("--text", required=True, nargs="+", type=Path, metavar="FILE", help="text to cut prompts from, UTF-8")
    add("--out", required=True, type=Path, metavar="FILE", help="the profile to write, JSON")
    add("--layers", required=True, type=_count, help="how many layers the profile makes sparse")
    add("--tokens", type=_count, default=2048, help="length of a prompt")
    add("--samples", type=_count, default=16, help="number of prompts")
    add(
        "--geometry",
        type=_geometry,
        default=TriangleMixConfig().geometry,
        metavar="S/W/L",
        help="sinks/window/last rows",
    )
    add("--estimator", choices=ESTIMATORS, default="gradient", help="how layers are judged")
    add("--measure", choices=MEASURES, default="absolute", help="which gradient ranks the layers")
    add("--greedy", type=_count, help="layers that 'direct' chooses one after the other; none: half of them")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu or cuda")
    add("--dtype", choices=_DTYPES, default="float32", help="of the weights")
    add("--resume", type=Path, metavar="FILE", help="remember what is measured here, and go on from it")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Calibrate, write the profile, show the layers; exits with 2 on bad arguments."""
    console = Console(stderr=True)
    sink, window, last = options.geometry
    config = TriangleMixConfig(sink, window, last)
    keep = 1 if options.estimator == "gradient" else max(1, min(64, last))
    try:
        for name, path in (("out", options.out), ("resume", options.resume)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{name} must be a file in an existing folder, got {str(path)!r}")
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("device must be cpu, torch finds no CUDA device")
        texts = read_texts(options.text)
        dtype = getattr(torch, options.dtype)
        model, tokenizer = load(options.model, dtype=dtype, device=options.device, gguf_file=options.gguf_file)
        depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
        if depth is not None and options.layers > depth:
            raise ValueError(f"layers must be at most the model's {depth}, got {options.layers}")
        samples = prompts(model, tokenizer, texts, tokens=options.tokens, samples=options.samples, keep=keep)
        found = calibrate(
            model,
            samples,
            config=config,
            estimator=options.estimator,
            measure=options.measure,
            greedy=options.greedy,
            resume=options.resume,
        )
        found.to_profile(options.out, options.layers)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    console.print(table(found))
    console.print(f"wrote {options.out} with layers {list(found.layers(options.layers))} sparse", markup=False)


def table(found: Calibration) -> Table:
    """The layers from the one needed least, with every score."""
    unit = "nats" if found.estimator == "direct" else "logits per attended pair"
    shown = Table(title=f"{found.estimator}, ranked by {found.measure}; scores in {unit}", title_justify="left")
    for name in ("rank", "layer", *found.scores):
        shown.add_column(name, justify="right")
    for rank, layer in enumerate(found.ranking, 1):
        shown.add_row(str(rank), str(layer), *(f"{scores[layer]:.3e}" for scores in found.scores.values()))
    return shown


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _geometry(text: str) -> tuple[int, int, int]:
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be sinks/window/last rows as in 8/64/128, got {text!r}")
    sink, window, last = map(int, parts)
    return sink, window, last
