"""People, towns and rivers that do not exist: nothing about them can be known but from the context."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from calidrop.eval.tasks._words import lists


@dataclass(frozen=True)
class Person:
    name: str
    town: str
    river: str
    trade: str
    topic: str
    year: int

    def life(self) -> str:
        return (
            f"{self.name} was born in the town of {self.town} in {self.year}. After an apprenticeship as a "
            f"{self.trade}, {self.name.split()[0]} settled abroad and wrote a long book about {self.topic}."
        )

    def home(self) -> str:
        return f"{self.town} is a small town. It lies on the river {self.river} and has a market every Thursday."


def people(draw: Random, n: int) -> list[Person]:
    """n of them, no two sharing a name, a town or a river. Raises ValueError where there are not so many."""
    word = lists()
    names = [f"{a} {b}" for a in word["first"] for b in word["last"]]
    places = [a + b for a in word["heads"] for b in word["tails"]]
    if n > min(len(names), len(places) // 2):
        raise ValueError(f"only {min(len(names), len(places) // 2)} people are there, {n} were asked for")
    chosen, where = draw.sample(names, n), draw.sample(places, 2 * n)
    trade, topic = (lambda: draw.choice(word["trades"])), (lambda: draw.choice(word["topics"]))
    return [
        Person(name, where[2 * i], where[2 * i + 1], trade(), topic(), draw.randint(1790, 1899))
        for i, name in enumerate(chosen)
    ]
