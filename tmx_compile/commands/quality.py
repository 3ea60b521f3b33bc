"""The commands ``tmx evaluate`` and ``tmx advise``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tmx_compile.analysis.choose.advise import BOUNDS, Advice, advise
from tmx_compile.analysis.choose.mix import mixes, read_scores
from tmx_compile.analysis.judge.choice import Choice
from tmx_compile.analysis.judge.evaluate import candidates, evaluate, read_ranking
from tmx_compile.analysis.judge.evaluation import METRICS, Evaluation
from tmx_compile.analysis.judge.intervals import Interval
from tmx_compile.analysis.judge.language_model import pieces
from tmx_compile.bench.layer_times import read_times
from tmx_compile.commands.calibrate import DTYPES, depth_of, loaded, model_arguments
from tmx_compile.commands.values import check_folders, count, counts, geometries, number
from tmx_compile.config import TriangleMixConfig

# Of a table that goes to no terminal.
_WIDTH = 180


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tmx evaluate`` to its parser."""
    model_arguments(parser)
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="FILE", help="the evaluation to write, JSON")
    add("--counts", required=True, type=counts, metavar="N,N,...", help="how many layers are sparse, several by commas")
    usual = (TriangleMixConfig().geometry,)
    geometry_help = "sinks/window/last rows, several by commas"
    add("--geometry", type=geometries, default=usual, metavar="S/W/L,...", help=geometry_help)
    profile_help = (
        "calibrated profiles whose rankings to try beside the deepest layers; with --dynamic-shares: mixes too"
    )
    add("--profile", nargs="+", type=Path, default=[], metavar="FILE", help=profile_help)
    plan_help = "profiles whose own layers, triangle and dynamic ones, to try as they are"
    add("--plan", nargs="+", type=Path, default=[], metavar="FILE", help=plan_help)
    add("--tokens", type=count, default=2048, help="length of a prompt")
    add("--samples", type=count, default=8, help="number of prompts")
    add("--final", type=count, default=64, help="how many of a prompt's last tokens are compared")
    add("--following", type=count, default=128, help="how many tokens after a prompt are compared")
    add("--streaming", action="store_true", help="evaluate each choice with streaming decode too")
    add("--resume", type=Path, metavar="FILE", help="remember what is measured here, and go on from it")


def run_evaluate(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Evaluate, write the result, show the costs; exits with 2 on bad arguments."""
    try:
        check_folders(out=options.out, resume=options.resume)
        for option in ("profile", "plan"):
            _check_files(option, getattr(options, option))
        if options.samples < 2:
            raise ValueError(f"samples must be at least 2, or intervals say nothing, got {options.samples}")
        if options.tokens <= options.final:
            raise ValueError(f"tokens must be more than final={options.final}, got {options.tokens}")
        model, tokenizer, texts = loaded(options)
        depth = depth_of(model)
        if depth is None:
            raise ValueError(f"model must tell num_hidden_layers, {type(model).__name__} does not")
        rankings = {path.stem: read_ranking(path, num_layers=depth, model=model) for path in options.profile}
        scores = {path.stem: read_scores(path, num_layers=depth, model=model) for path in options.profile}
        plans = {
            f"plan/{path.stem}": TriangleMixConfig.from_profile(path, num_layers=depth, model=model)
            for path in options.plan
        }
        choices = candidates(
            rankings,
            num_layers=depth,
            geometries=options.geometry,
            counts=options.counts,
            streaming=options.streaming,
        )
        choices |= mixes(
            {name: found for name, found in scores.items() if found is not None},
            num_layers=depth,
            counts=options.counts,
            tokens=options.tokens,
            streaming=options.streaming,
        )
        choices |= {name: Choice.of(plan) for name, plan in plans.items()}
        prompts = pieces(tokenizer, texts, options.tokens + options.following, options.samples)
        found = evaluate(
            model,
            list(prompts),
            choices,
            final=options.final,
            following=options.following,
            resume=options.resume,
        )
        found.save(options.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    console = _console()
    console.print(cost_table(found))
    console.print(f"wrote {options.out}", markup=False)


def _check_files(option: str, paths: Sequence[Path]) -> None:
    """``ValueError`` for files that are not there, or whose choices would have one name."""
    stems = [path.stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ValueError(f"{option} must be files of different names, got {stem!r} more than once")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{option} must be a file, got {str(path)!r}")


def advise_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tmx advise`` to its parser."""
    add = parser.add_argument
    add("evaluation", type=Path, metavar="EVALUATION", help="what `tmx evaluate` wrote")
    budget_help = "the most that may be lost: nats for kl_..., perplexity over dense perplexity less 1 for ppl_..."
    add("--budget", required=True, type=number, help=budget_help)
    add("--tokens", required=True, type=count, help="the prompt length to be fast at")
    add("--metric", choices=METRICS, default="ppl_final", help="what the budget is of")
    bound_help = "what has to be within the budget: the upper end of the cost's interval, or its mean"
    add("--bound", choices=BOUNDS, default="upper", help=bound_help)
    add("--streaming", action="store_true", help="choose among the choices with streaming decode")
    add("--times", type=Path, metavar="FILE", help="layer times that `tmx bench --out` wrote; none: measure them here")
    add("--device", help="where to measure, cpu or cuda; none: where the evaluation ran")
    add("--dtype", choices=DTYPES, help="of the measured layers; none: that of the evaluation")
    add("--seconds", type=number, default=5.0, help="to spend on the timed rounds of each geometry")
    add("--min-seq-len", type=count, default=TriangleMixConfig.min_seq_len, help="prompts up to here stay dense")
    add("--save", type=Path, metavar="FILE", help="the profile to write, for TriangleMixConfig.from_profile")


def run_advise(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Show the choices and the best one as code; exits with 2 on bad arguments, with 1 where nothing fits."""
    console = _console()
    try:
        check_folders(save=options.save)
        if options.device is not None and options.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {options.device!r}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu, torch finds no CUDA device")
        found = advise(
            Evaluation.load(options.evaluation),
            budget=options.budget,
            tokens=options.tokens,
            metric=options.metric,
            bound=options.bound,
            streaming=options.streaming,
            times=None if options.times is None else read_times(options.times),
            device=options.device,
            dtype=options.dtype,
            seconds=options.seconds,
            min_seq_len=options.min_seq_len,
            note=lambda text: console.print(f"[dim]timing a layer: {text}"),
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    console.print(advice_table(found))
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    console.print(found.verdict, markup=False, highlight=False)
    if found.best is None:
        raise SystemExit(1)
    # On its own on standard output, so that it can go into a file.
    print(found.code(), end="")
    if options.save is not None:
        found.save(options.save)
        console.print(f"wrote {options.save}", markup=False)


def cost_table(found: Evaluation) -> Table:
    """What each choice costs."""
    shortest, longest = found.tokens
    lengths = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    title = (
        f"{found.prompts} prompts of {lengths} tokens, {found.final} final and {found.following} following tokens; "
        f"dense perplexity {found.dense['ppl_final']:.4g} and {found.dense['ppl_following']:.4g}; [95% interval]"
    )
    shown = Table(title=title, title_justify="left")
    shown.add_column("choice", overflow="fold")
    for name in ("layers", *METRICS):
        shown.add_column(name, justify="right")
    for name, record in found.records.items():
        costs = (_cost(metric, record.cost(metric)) for metric in METRICS)
        shown.add_row(name, _layers(record.choice), *costs)
    return shown


def advice_table(found: Advice) -> Table:
    """The choices from the best, with what each saves where it fits."""
    times = {(x.lowering, x.machine) for x in found.times}
    where = "; ".join(f"{lowering} on {machine}" for lowering, machine in sorted(times)) or "nothing timed"
    title = f"within {found.budget:g} by {found.metric}, {found.tokens:,} tokens, {found.dtype}; {where}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("choice", overflow="fold")
    for name in ("layers", found.metric, "fits", "saved ms"):
        shown.add_column(name, justify="right")
    for x in found.candidates:
        saved = "-" if x.saved_ms is None else f"{x.saved_ms:.4g}"
        cost = _cost(found.metric, x.cost)
        shown.add_row(x.name, _layers(x.record.choice), cost, "yes" if x.fits else "no", saved)
    return shown


def _layers(choice: Choice) -> str:
    """How many are sparse: triangle layers, and dynamic ones."""
    dynamic = len(choice.dynamic.layers)
    return f"{len(choice.layers)} + {dynamic} dynamic" if dynamic else str(len(choice.layers))


def _cost(metric: str, cost: Interval) -> str:
    digits = "+.2%" if metric.startswith("ppl") else ".4f"
    # Escaped: rich takes brackets for markup.
    return f"{cost.mean:{digits}} \\[{cost.lower:{digits}}, {cost.upper:{digits}}]"


def _console() -> Console:
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=_WIDTH)
