"""How much of what a response attends to is kept: chats about a book, answered by the model itself.

python -m benchmarks.hit_rate --recipe 'snapkv(budget=128)' --recipe 'judge_q(budget=128)' [--samples N] [--text FILE]

The instructions are none of those Judge Q is trained with. Per recipe, each with the standard error over samples, and
in brackets the mean difference to the first recipe on the same samples with its own error:

hit   of the b tokens that the response attends to most on average under the full cache, per layer and kv head, the
      fraction kept; b is how many are kept
mass  the fraction of that attention which is kept
KL    to the full cache, in nats, over the response fed token by token
"""

from __future__ import annotations

import argparse
import json
import random
from importlib import resources
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

import calidrop
from calidrop import KVCache
from calidrop.plugin import using
from calidrop.train._frozen import Frozen
from calidrop.train._prompts import chat

TEXT = resources.files("calidrop") / "data" / "alice.txt"
INSTRUCTIONS = (
    "What is this text about?",
    "Give the main points of the passage as a list.",
    "Which characters speak, and what do they talk about?",
    "Quote the funniest sentence and explain the joke.",
    "What does Alice do in this passage?",
    "Retell the passage from the point of view of one of the characters.",
    "Which animals or things are named here?",
    "Translate the first sentence of the passage into simple words.",
    "What is the problem that has to be solved here?",
    "Write one question that a teacher could ask about this text.",
    "How does the passage end?",
    "Describe the scene as a picture.",
)


def chats(tokenizer: Any, text: str, n: int, length: int, seed: int = 0) -> list[list[int]]:
    """Passages of `length` tokens, spread evenly over the text, each with an instruction after it."""
    ids, draw = tokenizer(text, verbose=False)["input_ids"], random.Random(seed)
    starts = [round(i * (len(ids) - length) / max(1, n - 1)) for i in range(n)]
    asked = [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(n)]
    draw.shuffle(asked)
    passages = (tokenizer.decode(ids[start : start + length]).strip() for start in starts)
    return [chat(tokenizer, f"{passage}\n\n{ask}") for passage, ask in zip(passages, asked, strict=True)]


def kept(cache: Any, length: int) -> Tensor:
    """Which columns of a prompt are still there in layers that see everything, bool [layers,H,length]."""
    marks = []
    for s in (layer.state for layer in cache.layers if layer.reach is None):
        held = (s.store.tokens() if s.store else []) + ([s.window.tokens()] if len(s.window) else [])
        pos = torch.cat([t.pos[0] for t in held], 1).long()
        marks.append(torch.zeros(len(pos), length + 1).bool().scatter_(1, pos % (length + 1), True))  # -1: the last
    return torch.stack(marks)[..., :length]


def overlap(marks: Tensor, target: Tensor) -> tuple[float, float]:
    """hit and mass. target: mean attention [layers,H,N]."""
    rank = target.argsort(-1, descending=True).argsort(-1)
    best = rank < marks.sum(-1, keepdim=True)
    hit = (best & marks).sum(-1) / best.sum(-1).clamp(min=1)
    return float(hit.mean()), float(((target * marks).sum(-1) / target.sum(-1)).mean())


@torch.inference_mode()
def respond(model: Any, cache: KVCache, prompt: list[int], said: list[int]) -> tuple[Tensor, list[Tensor]]:
    """What is kept of the prompt, and fp64 log-probabilities after each token of `said`, fed one by one."""
    model(torch.tensor([prompt]), **using(cache), logits_to_keep=1)
    marks = kept(cache, len(prompt))
    steps = [model(torch.tensor([[token]]), **using(cache)).logits[0, -1] for token in said]
    return marks, [x.double().log_softmax(-1) for x in steps]


def measure(model: Any, frozen: Frozen, recipes: list[str], prompt: list[int], most: int, quick: bool) -> list[dict]:
    """hit, mass and (not when quick) KL of each recipe."""
    with frozen.use():
        sample, said = frozen.sample(prompt, None, most)
    target = sample.target.float().unflatten(1, (frozen.layers[0].kv_heads, -1)).mean(2)
    said = [] if quick else said[:-1]
    full = respond(model, KVCache(model), prompt, said)[1] if said else []
    found = []
    for recipe in recipes:
        marks, own = respond(model, KVCache(model, recipe, eager=True), prompt, said)
        hit, mass = overlap(marks, target)
        found.append({"hit": hit, "mass": mass})
        if said:
            kl = [float((p.exp() * (p - q)).sum()) for p, q in zip(full, own, strict=True)]
            found[-1]["KL"] = mean(kl)
    return found


def told(values: list[float], first: list[float]) -> str:
    def spread(x: list[float]) -> str:
        return f"±{stdev(x) / len(x) ** 0.5:.4f}" if len(x) > 1 else ""

    gap = [a - b for a, b in zip(values, first, strict=True)]
    return f"{mean(values):.4f}{spread(values)} ({mean(gap):+.4f}{spread(gap)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--length", type=int, default=768)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--response", type=int, default=48)
    parser.add_argument("--quick", action="store_true", help="without the KL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = calidrop.load()
    frozen, rows = Frozen(model), []
    for i, prompt in enumerate(chats(tokenizer, args.text.read_text("utf-8"), args.samples, args.length)):
        rows.append(measure(model, frozen, args.recipe, prompt, args.response, args.quick))
        print(f"{i + 1} of {args.samples}", flush=True)
    names = list(rows[0][0])
    print(f"{'recipe':44} " + " ".join(f"{name:>32}" for name in names), f"  {args.length} tokens, {len(rows)} chats")
    for at, recipe in enumerate(args.recipe):
        columns = (told([row[at][name] for row in rows], [row[0][name] for row in rows]) for name in names)
        print(f"{recipe:44} " + " ".join(f"{column:>32}" for column in columns))
    if args.json:
        args.json.write_text(json.dumps({"length": args.length, "response": args.response, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
