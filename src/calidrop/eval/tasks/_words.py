"""Words to name things with."""

from __future__ import annotations

import random
import uuid
from functools import lru_cache

from calidrop.eval.kit import shipped


@lru_cache(1)
def lists() -> dict[str, list[str]]:
    """The lists of data/words.txt by name."""
    named = (line.split(": ") for line in shipped("words.txt").splitlines())
    return {name: words.split() for name, words in named}


def number(draw: random.Random, digits: int = 7) -> str:
    return str(draw.randint(10 ** (digits - 1), 10**digits - 1))


def identifier(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def pairs(draw: random.Random, n: int) -> list[str]:
    """n different adjective-noun pairs. Raises ValueError where there are not so many."""
    adjectives, nouns = lists()["adjectives"], lists()["nouns"]
    m = len(adjectives) * len(nouns)
    if n > m:
        raise ValueError(f"only {m} names are there, {n} were asked for")
    return [f"{adjectives[i % len(adjectives)]}-{nouns[i // len(adjectives)]}" for i in draw.sample(range(m), n)]
