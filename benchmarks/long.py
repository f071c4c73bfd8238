"""Long generation from short prompts: how far a recipe is from the full cache after thousands of generated tokens.

python -m benchmarks.long [--budget 512] [--recipe R ...] [--tokens 4096] [--prompts 4] [--skip 0] [--json OUT]

The full cache writes, sampled at temperature 0.8 with a fixed seed (greedily this model loops): half of the prompts
are 128 tokens of "Alice's Adventures in Wonderland", half are questions of GSM8K, left-padded to one batch. Every
recipe is fed the same tokens one by one, in lockstep. Without --recipe: every evictor that works while decoding, at
--budget.

Results are kept in --folder: recipes that were measured are not run again, others are fed the tokens written then. A
run that was stopped goes on where it last saved (every 256 tokens).

Per recipe: KL to the full cache in nats, in all and in quarters of the generation, agreement of the likeliest token,
nll of the token written; mean over prompts, with the standard error over prompts. MB (10^6 bytes): the most the cache
ever held. ms: CPU time of attention and compression in a step, all layers and prompts, median.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import time
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import platformdirs
import torch
from torch import Tensor

import calidrop
from benchmarks.abreast import Abreast
from benchmarks.snapkv_once import snapkv_once
from calidrop import KVCache
from calidrop.methods import METHODS, h2o, lazy_eviction, snapkv, streaming_llm, tova
from calidrop.parts import Part
from calidrop.plugin import using
from calidrop.recipe import Recipe, parse

BOOK = Path(__file__).parents[1] / "tests" / "data" / "alice.txt"
QUESTIONS = Path(__file__).with_name("data") / "gsm8k.json"
TEMPERATURE, SAVE = 0.8, 256
Found = dict[str, np.ndarray]
"""kl, agree, nll, nll_full [n,prompts]; bytes, ms [n]."""


def defaults(n: int) -> list[Part]:
    return [streaming_llm(n), snapkv_once(n), snapkv(n, every=16), h2o(n), tova(n), lazy_eviction(n)]


def prompts(tokenizer: Any, n: int, skip: int) -> dict[str, Tensor]:
    """n prompts, left-padded: pages and questions in turn, without the first `skip`."""
    book = tokenizer(BOOK.read_text(), verbose=False)["input_ids"]
    questions = json.loads(QUESTIONS.read_text())["questions"]
    rows = []
    for i in range(skip, skip + n):
        ask = [{"role": "user", "content": questions[i // 2 % len(questions)] + " Think step by step."}]
        asked = tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
        start = 3000 + 4000 * (i // 2)
        rows.append(tokenizer(asked)["input_ids"] if i % 2 else book[start : start + 128])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class Saver(pickle.Pickler):
    """Pickles caches without the functions in them: empty caches of the same recipes have them in the same order."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.functions: dict[FunctionType, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, FunctionType) or "<locals>" not in obj.__qualname__:
            return None
        return self.functions.setdefault(obj, len(self.functions))


class Loader(pickle.Unpickler):
    def __init__(self, file: Any, functions: list[FunctionType]):
        super().__init__(file)
        self.functions = functions

    def persistent_load(self, pid: int) -> FunctionType:
        return self.functions[pid]


class Run:
    """The full cache and others side by side. What it knows after i steps is all in `state`."""

    def __init__(self, model: Any, recipes: list[Part | Recipe], inputs: dict[str, Tensor], n: int, saved: Path):
        self.model, self.n, self.saved = model, n, saved
        self.caches = [KVCache(model, recipe, eager=True) for recipe in ("full", *recipes)]
        self.abreast = Abreast(self.caches)
        self.inputs = {name: x.repeat(len(self.caches), 1) for name, x in inputs.items()}
        rows, self.at = inputs["input_ids"].shape
        mask = self.inputs["attention_mask"]
        self.mask = torch.cat([mask, mask.new_ones(len(mask), n)], 1)
        self.position = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.state: dict[str, Any] = {
            "tokens": [],
            "draws": [torch.Generator().manual_seed(row).get_state() for row in range(rows)],
            "logits": None,
            "found": [{} for _ in recipes],
        }

    @torch.inference_mode()
    def __call__(self, special: list[int], written: Tensor | None) -> tuple[Tensor, list[Found]]:
        """written: the tokens [rows,n+1], or None: draw them, none of the `special` ones."""
        if self.saved.is_file():
            self._load()
        else:
            self.state["logits"] = self._forward(self.inputs["input_ids"], slice(0, self.at))
        s = self.state
        began, first = time.monotonic(), len(s["tokens"])
        for i in range(first, self.n + 1):
            s["tokens"].append(self._draw(special) if written is None else written[:, i])
            if i:
                self._measure(s["tokens"][-1])
            if i < self.n:
                now = slice(self.at + i, self.at + i + 1)
                s["logits"] = self._forward(s["tokens"][-1].repeat(len(self.caches))[:, None], now)
            if (i + 1) % SAVE == 0 and i < self.n:
                self._save()
                left = (time.monotonic() - began) / (i + 1 - first) * (self.n - i - 1) / 60
                print(f"{i + 1} of {self.n} tokens, {left:.0f} min left", flush=True)
        self.saved.unlink(missing_ok=True)
        return torch.stack(s["tokens"], 1), [{k: np.stack(v) for k, v in found.items()} for found in s["found"]]

    def _forward(self, ids: Tensor, now: slice) -> Tensor:
        self.abreast.seconds()
        mask, position = self.mask[:, : now.stop], self.position[:, now]
        out = self.model(ids, attention_mask=mask, position_ids=position, **using(self.abreast), logits_to_keep=1)
        return out.logits[:, -1]

    def _draw(self, special: list[int]) -> Tensor:
        p = self.state["logits"][: len(self.state["draws"])] / TEMPERATURE
        p, tokens, draw = p.index_fill(-1, torch.tensor(special), float("-inf")).softmax(-1), [], torch.Generator()
        for row, state in enumerate(self.state["draws"]):
            draw.set_state(state)
            tokens.append(p[row].multinomial(1, generator=draw))
            self.state["draws"][row] = draw.get_state()
        return torch.cat(tokens)

    def _measure(self, target: Tensor) -> None:
        full, *others = self.state["logits"].log_softmax(-1).chunk(len(self.caches))
        spent = self.abreast.seconds()[1:]
        for q, cache, seconds, found in zip(others, self.caches[1:], spent, self.state["found"], strict=True):
            for name, x in {
                "kl": (full.exp() * (full - q)).sum(-1).clamp(min=0.0),
                "agree": (full.argmax(-1) == q.argmax(-1)).float(),
                "nll": -q.gather(1, target[:, None])[:, 0],
                "nll_full": -full.gather(1, target[:, None])[:, 0],
                "bytes": torch.tensor(cache.nbytes),
                "ms": torch.tensor(1000 * seconds),
            }.items():
                found.setdefault(name, []).append(x.numpy())

    def _states(self) -> list[Any]:
        return [[layer.state for layer in cache.layers] for cache in self.caches]

    def _save(self) -> None:
        new = self.saved.with_suffix(".new")
        with new.open("wb") as file:
            Saver(file).dump({"caches": self._states(), **self.state})
        new.replace(self.saved)

    def _load(self) -> None:
        empty = Saver(io.BytesIO())
        empty.dump(self._states())
        with self.saved.open("rb") as file:
            self.state = Loader(file, list(empty.functions)).load()
        for cache, states in zip(self.caches, self.state.pop("caches"), strict=True):
            for layer, state in zip(cache.layers, states, strict=True):
                layer.state = state


def measure(model: Any, tokenizer: Any, recipes: list[Any], n: int, count: int, skip: int, folder: Path) -> list[Found]:
    """One for each recipe; runs those that are not in the folder."""
    inputs = prompts(tokenizer, count, skip)
    folder /= _hash(json.dumps([n, TEMPERATURE, inputs["input_ids"].tolist()]))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{_hash(str(recipe))}.npz" for recipe in recipes]
    missing = [(recipe, path) for recipe, path in zip(recipes, paths, strict=True) if not path.is_file()]
    if missing:
        tokens = folder / "tokens.npy"
        saved = folder / f"{_hash(' '.join(str(recipe) for recipe, _ in missing))}.saved"
        run = Run(model, [recipe for recipe, _ in missing], inputs, n, saved)
        written = torch.from_numpy(np.load(tokens)) if tokens.is_file() else None
        written, found = run(tokenizer.all_special_ids, written)
        np.save(tokens, written.numpy())
        for (_, path), x in zip(missing, found, strict=True):
            np.savez(path, **x)
    return [dict(np.load(path)) for path in paths]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def line(name: str, found: Found) -> str:
    n, P = found["kl"].shape
    quarters = [found["kl"][i * n // 4 : (i + 1) * n // 4].mean() for i in range(4)]
    kl, nll, agree = (found[k].mean(0) for k in ("kl", "nll", "agree"))
    error = kl.std(ddof=1) / P**0.5 if P > 1 else float("nan")
    return (
        f"{name:48} {kl.mean():7.4f} ±{error:.4f}  {' '.join(f'{x:.3f}' for x in quarters)} {agree.mean():6.1%} "
        f"{nll.mean():6.3f} {found['bytes'].max() / 1e6:7.2f} {np.median(found['ms']):6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(platformdirs.user_cache_dir("calidrop")) / "long")
    parser.add_argument("--json", type=Path, help="all numbers, one list per prompt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    METHODS["snapkv_once"] = snapkv_once  # so that a recipe may name it, here
    recipes = [parse(recipe) for recipe in args.recipe] or defaults(args.budget)
    model, tokenizer = calidrop.load()
    rows = measure(model, tokenizer, recipes, args.tokens, args.prompts, args.skip, args.folder)
    print(f"{args.prompts} prompts, {args.tokens} tokens, nll of the full cache {rows[0]['nll_full'].mean():.3f}")
    print(f"{'recipe':48} {'KL':>7} {'':7}  {'in quarters':23} {'agree':>6} {'nll':>6} {'MB':>7} {'ms':>6}")
    for recipe, found in zip(recipes, rows, strict=True):
        print(line(str(recipe), found))
    if args.json:
        told = {
            str(recipe): {k: x.tolist() for k, x in found.items()} for recipe, found in zip(recipes, rows, strict=True)
        }
        args.json.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
