"""The command ``tmx calibrate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tmx_compile.analysis.capture.sections import MEASURES
from tmx_compile.analysis.choose.calibration import Calibration
from tmx_compile.analysis.choose.estimate import ESTIMATORS, calibrate
from tmx_compile.analysis.judge.language_model import load, prompts, read_texts
from tmx_compile.commands.values import check_folders, count, geometry, numbers
from tmx_compile.config import TriangleMixConfig
from tmx_compile.mask.selection import BLOCKS, METHODS, Selection

DTYPES = ("float32", "bfloat16", "float16")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    model_arguments(parser)
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="FILE", help="the profile to write, JSON")
    add("--layers", required=True, type=count, help="how many layers the profile makes sparse")
    add("--tokens", type=count, default=2048, help="length of a prompt")
    add("--samples", type=count, default=16, help="number of prompts")
    add(
        "--geometry",
        type=geometry,
        default=TriangleMixConfig().geometry,
        metavar="S/W/L",
        help="sinks/window/last rows",
    )
    add("--estimator", choices=ESTIMATORS, default="gradient", help="how layers are judged")
    add("--measure", choices=MEASURES, default="absolute", help="which gradient ranks the layers")
    add("--greedy", type=count, help="layers that 'direct' chooses one after the other; none: half of them")
    shares_help = "also judge layers with blocks chosen while they run, at these shares; with 'direct'"
    add("--dynamic-shares", type=numbers, default=(), metavar="S,S,...", help=shares_help)
    add("--dynamic-method", choices=METHODS, default=Selection.method, help="how those choose")
    add("--dynamic-block", type=int, choices=BLOCKS, default=Selection.block, help="side of their blocks")
    group_help = "tokens that their estimate takes together, at most a block; by default as in a configuration"
    add("--dynamic-group", type=int, choices=BLOCKS, help=group_help)
    add("--resume", type=Path, metavar="FILE", help="remember what is measured here, and go on from it")


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names a model and text, for :func:`loaded`."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="folder or name of a causal language model of Transformers")
    add("--gguf-file", metavar="FILE", help="the file in the model's folder, for weights in GGUF")
    add("--text", required=True, nargs="+", type=Path, metavar="FILE", help="text to cut prompts from, UTF-8")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Calibrate, write the profile, show the layers; exits with 2 on bad arguments."""
    console = Console(stderr=True)
    words = {name: getattr(options, name) for name in ("dynamic_method", "dynamic_block", "dynamic_group")}
    keep = 1 if options.estimator == "gradient" else max(1, min(64, options.geometry.last))
    try:
        config = TriangleMixConfig(*options.geometry.counts, **words)
        check_folders(out=options.out, resume=options.resume)
        if options.dynamic_shares and options.estimator != "direct":
            raise ValueError(f"dynamic-shares need the estimator direct, got {options.estimator}")
        model, tokenizer, texts = loaded(options)
        depth = depth_of(model)
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
            shares=options.dynamic_shares,
            resume=options.resume,
        )
        found.to_profile(options.out, options.layers)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    console.print(table(found))
    if found.dynamic:
        console.print(dynamic_table(found))
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


def dynamic_table(found: Calibration) -> Table:
    """The layers from the one that gives blocks away most cheaply at the first share, with every share."""
    config = found.config
    title = (
        f"blocks of {config.dynamic_block} chosen while they run, {config.dynamic_method}: nats at a density, by share"
    )
    shown = Table(title=title, title_justify="left")
    for name in ("rank", "layer", *(f"{x.share:g}" for x in found.dynamic)):
        shown.add_column(name, justify="right")
    for rank, layer in enumerate(found.dynamic[0].ranking, 1):
        costs = (f"{x.divergence[layer]:.3e} at {x.density[layer]:.1%}" for x in found.dynamic)
        shown.add_row(str(rank), str(layer), *costs)
    return shown


def loaded(options: argparse.Namespace) -> tuple[nn.Module, Any, list[str]]:
    """The model, its tokenizer and the texts that :func:`model_arguments` name.

    ``ValueError`` or ``OSError`` for what cannot be loaded or read.
    """
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device must be cpu, torch finds no CUDA device")
    texts = read_texts(options.text)
    dtype = getattr(torch, options.dtype)
    model, tokenizer = load(options.model, dtype=dtype, device=options.device, gguf_file=options.gguf_file)
    return model, tokenizer, texts


def depth_of(model: nn.Module) -> int | None:
    """How many layers the model's configuration tells."""
    depth: int | None = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return depth
