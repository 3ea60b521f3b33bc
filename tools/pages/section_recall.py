"""docs/quality.md, the part on the model that was trained to recall."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from studies.recall_tasks import HOPS, VALUES
from tools.pages import drawing
from tools.pages.markdown import Fields, slashed, table
from tools.pages.pictures import Picture
from tools.pages.results import today

FILE, TRAINING = "recall.json", "recall/recall-model.json"
PICTURE = "quality-recall.svg"
TITLE = "A model where damage shows"
KEPT = 0.01
"""Accuracy, of 1, that a task may lose for its layers to count as free."""
_PLAIN = ("gradient", "direct", "deepest", "first")

Place = tuple[int, tuple[int, ...]]


def section(result: Fields, training: Fields) -> str:
    """Everything below the origin of the numbers."""
    records = result["records"]
    tasks = list(records[0]["dense"])
    depth = training["shape"]["layers"]
    parts = [_model(training, result["settings"]), _dense(records, tasks), _free(records, tasks, depth)]
    parts += [_breaks(records, tasks, depth), _halves(records, tasks, depth)]
    parts.append(f"![accuracy by number of sparse layers]({PICTURE})")
    return "\n\n".join(parts)


def short(records: Sequence[Fields], depth: int) -> str:
    """The answer in a sentence, from the longest prompts."""
    tasks = list(records[0]["dense"])
    longest = max(r["tokens"] for r in records)
    said = []
    for place in places(records):
        if place[0] != longest:
            continue
        here = _at(records, place)
        found = _most(here, tasks, depth)
        free = (
            f"{found[0]} of {depth} layers ({found[1]}) lose at most {KEPT:.0%}"
            if found[0]
            else "not one layer is free"
        )
        halves = [r for r in here if r["count"] == depth // 2]
        record, task = _worst([r for r in halves if r["policy"] in ("gradient", "direct", "deepest")], tasks)
        loss = _loss(record, task)
        half = (
            f"half of them cost up to {loss:.1%} ({record['policy']}, {task}: {_from_to(record, task)})"
            if loss > 0
            else "half of them cost nothing"
        )
        # Where it was measured.
        for first in (r for r in halves if r["policy"] == "first"):
            _, task = _worst([first], tasks)
            half += f", the first {depth // 2} layers {_loss(first, task):.1%} ({task}: {_from_to(first, task)})"
        said.append(f"with {slashed(place[1])} {free}, {half}")
    return f"A model trained to recall, at {longest:,} tokens: {'; '.join(said)}."


def _worst(records: Iterable[Fields], tasks: Sequence[str]) -> tuple[Fields, str]:
    """The record and the task that lose most, the first of equals."""
    return max(((r, task) for r in records for task in tasks), key=lambda pair: _loss(*pair))


def _from_to(record: Fields, task: str) -> str:
    return f"{record['dense'][task]:.1%} to {record['accuracy'][task]:.1%}"


def _loss(record: Fields, task: str) -> float:
    """Accuracy lost, of 1. Rounded: a loss of exactly what is allowed is no more than that."""
    return round(float(record["dense"][task] - record["accuracy"][task]), 9)


def _model(training: Fields, settings: Fields) -> str:
    shape, last = training["shape"], training["log"][-1]
    answers = settings["sequences"] * settings["questions"]
    copied = settings["sequences"] * (settings["listed"] - 1)
    return (
        f"A Llama of {training['parameters'] / 1e6:.1f} million parameters ({shape['layers']} layers, hidden size "
        f"{shape['hidden']}, {shape['heads']} heads), trained from seed {training['seed']} for {last['minutes']:.0f} "
        f"minutes, compilation included, {last['step']:,} steps, on one {training['hardware']['gpu']} by "
        f"`{today(training['command'])}`; its weights are in the repository. Three heads of the first layer begin "
        "looking one, two and three tokens back, those of later layers looking for tokens like their own. It reads "
        "names that are given values, names for names, and a list, in noise, and is asked for values "
        f"{_hops()} away and for the list. All questions stand among the last rows: what is lost was lost in the "
        f"middle. Each figure is the accuracy over {answers:,} answers, {copied:,} for the list; the same sequences "
        f"for every choice of layers. A guess among the {VALUES} values is right in {1 / VALUES:.1%}."
    )


def _hops() -> str:
    return ", ".join(map(str, range(HOPS - 1))) + f" or {HOPS - 1} hops"


def places(records: Iterable[Fields]) -> list[Place]:
    """The (tokens, geometry) pairs in order."""
    return list(dict.fromkeys((r["tokens"], tuple(r["geometry"])) for r in records))


def _at(records: Iterable[Fields], place: Place) -> list[Fields]:
    return [r for r in records if (r["tokens"], tuple(r["geometry"])) == place]


def _dense(records: Sequence[Fields], tasks: Sequence[str]) -> str:
    rows = []
    lengths = [r["tokens"] for r in records]
    for tokens in (min(lengths), max(lengths)):
        dense = next(r["dense"] for r in records if r["tokens"] == tokens)
        rows.append([f"{tokens:,}", *(f"{dense[task]:.1%}" for task in tasks)])
    return f"Dense attention:\n\n{table(['tokens', *tasks], rows)}"


def _kept(here: Sequence[Fields], policy: str, tasks: Sequence[str], depth: int) -> int | None:
    """The most layers of a policy up to which every task keeps its accuracy; None: it was not measured.

    All layers are those of every policy.
    """
    if not any(r["policy"] == policy for r in here):
        return None
    own = {r["count"]: r for r in here if r["policy"] == policy or r["count"] == depth}
    count = 0
    while count + 1 in own and all(_loss(own[count + 1], task) <= KEPT for task in tasks):
        count += 1
    return count


def _most(here: Sequence[Fields], tasks: Sequence[str], depth: int) -> tuple[int, str]:
    """The most that any policy keeps, and the first that does. Random draws differ for every number: none to go by."""
    kept = [(_kept(here, policy, tasks, depth), policy) for policy in _PLAIN]
    return max(((count, policy) for count, policy in kept if count is not None), key=lambda pair: pair[0])


def _free(records: Sequence[Fields], tasks: Sequence[str], depth: int) -> str:
    lengths = {r["tokens"] for r in records}
    rows = []
    for place in places(records):
        if place[0] not in (min(lengths), max(lengths)):
            continue
        here = _at(records, place)
        count, policy = _most(here, tasks, depth)
        row = [f"{place[0]:,}", slashed(place[1]), f"{count} ({policy})" if count else "none"]
        kept = (_kept(here, name, tasks, depth) for name in _PLAIN)
        row += ["" if count is None else str(count) for count in kept]
        rows.append(row)
    head = ["tokens", "geometry", f"free of {depth}", *_PLAIN]
    return (
        f"Layers that can go sparse, one after the other, before any task loses more than {KEPT:.0%}: by the best of "
        f"four policies, and by each; the shortest and the longest prompts.\n\n{table(head, rows)}"
    )


def _breaks(records: Sequence[Fields], tasks: Sequence[str], depth: int) -> str:
    halves = [r for r in records if r["count"] == depth // 2]
    said = []
    for task in tasks:
        worst, _ = _worst(halves, [task])
        where = f"{worst['policy']}, {worst['tokens']:,} tokens, {slashed(worst['geometry'])}"
        fall = f"{_loss(worst, task):.1%} ({_from_to(worst, task)}; {where})"
        said.append(f"{task} {fall if _loss(worst, task) > 0 else 'nothing'}")
    return (
        "What breaks is what is looked up while the prompt is read: a value one or two names away needs rows of the "
        "middle that see far back. Most that any choice of half of the layers loses, by task: "
        f"{', '.join(said)}."
    )


def _halves(records: Sequence[Fields], tasks: Sequence[str], depth: int) -> str:
    rows: dict[tuple[Any, ...], list[str]] = {}
    longest = max(r["tokens"] for r in records)
    for place in (place for place in places(records) if place[0] == longest):
        for r in _at(records, place):
            if r["count"] == depth // 2:
                indices = ", ".join(map(str, r["indices"]))
                scores = [f"{r['accuracy'][task]:.1%}" for task in tasks]
                # Policies often choose the same layers.
                rows.setdefault((place, indices, *scores), []).append(r["policy"])
    lines = [
        [slashed(geometry), ", ".join(policies), indices, *scores]
        for ((_, geometry), indices, *scores), policies in rows.items()
        if not all(policy.startswith("random") for policy in policies)
    ]
    head = ["geometry", "policy", "layers", *tasks]
    return f"Half of the layers sparse, {longest:,} tokens (random draws are in the file):\n\n{table(head, lines)}"


def picture(result: Fields, depth: int) -> Picture:
    """The worst task's accuracy by number of layers, of the longest prompts with the widest geometry."""
    records = result["records"]
    place = max(places(records), key=lambda p: (p[0], sum(p[1])))
    own = _at(records, place)
    dense = min(own[0]["dense"].values())
    everything = [[depth, min(r["accuracy"].values())] for r in own if r["count"] == depth]
    lines = {}
    for policy in dict.fromkeys(r["policy"] for r in own):
        points = [[r["count"], min(r["accuracy"].values())] for r in own if r["policy"] == policy]
        if policy in _PLAIN:
            inner = sorted(point for point in points if 0 < point[0] < depth)
            lines[policy] = [[0, dense], *inner, *everything]
    # Policies often choose the same layers.
    same: dict[str, list[str]] = {}
    for policy, points in lines.items():
        same.setdefault(str(points), []).append(policy)
    data = {
        "title": f"Which layers go sparse decides what survives ({place[0]:,} tokens with {slashed(place[1])})",
        "x": f"sparse layers of {depth}",
        "y": "right answers of the worst task",
        "scales": ["linear", "share"],
        "named": "apart",
        "lines": [[", ".join(names), lines[names[0]], "solid", i] for i, names in enumerate(same.values())],
    }
    return Picture(PICTURE, data, drawing.lines)
