"""The lines of a drawn function, and random writes between them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.support.writes.written import Var, draw_write


@dataclass
class Line:
    """A line of a function, what it makes, and whether it belongs to the line above."""

    text: str
    makes: tuple[Var, ...] = ()
    glued: bool = False


@dataclass
class Function:
    """The lines of one function and the tensors in scope where it starts."""

    scope: tuple[Var, ...]
    lines: list[Line] = field(default_factory=list)

    def add(self, text: str, *makes: Var, glued: bool = False) -> None:
        self.lines.append(Line(text, makes, glued))

    def write(self, rng: random.Random, name: str) -> str | None:
        """Insert one random write; its description, or None where the draw came to nothing."""
        places = [i for i, line in enumerate(self.lines) if not line.glued]
        place = rng.choice(places)
        scope = {var.name: var for var in self.scope}
        born = dict.fromkeys(scope, 0)
        for i, line in enumerate(self.lines[:place]):
            for var in line.makes:
                scope[var.name], born[var.name] = var, i + 1
        if not scope:
            return None
        pool = list(scope.values())
        var = rng.choices(pool, [v.weight for v in pool])[0]
        write = draw_write(rng, var, name)
        if write is None:
            return None
        made = [Line(write.statement)]
        if write.view and rng.random() < 0.25:
            # The view is taken at one time and written at another.
            early = rng.choice([i for i in places if born[var.name] <= i <= place])
            self.lines.insert(place, made[0])
            self.lines.insert(early, Line(write.view))
        else:
            self.lines[place:place] = ([Line(write.view)] if write.view else []) + made
        return " | ".join((write.target, write.through, write.operator))

    def text(self) -> list[str]:
        return ["        " + line.text for line in self.lines]
