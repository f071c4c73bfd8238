"""Rows of kvpress beside our own, from the same prompts and by the same scores. kvpress needs an older transformers, so
this runs in an environment of its own, and takes nothing of calidrop but what is plain Python.

calidrop eval --task needle --length 1024 --samples 5 --dump-prompts prompts.jsonl
python -m venv kv && kv/bin/pip install kvpress==0.5.5
kv/bin/python benchmarks/kvpress_rows.py --prompts prompts.jsonl --model FOLDER --press SnapKVPress=0.9 --out rows.jsonl

The press drops the share that is given of the prompt's tokens; AdaKVPress(SnapKVPress)=0.9 is one press in another. A
prompt whose rows are in the file is not asked again. Presses that only choose tokens share one prefill, which is then
not timed. Rows are called "kvpress:SnapKVPress(0.9)"; that without
a press, to which KL and agreement are, "kvpress:full". Append them to a run's rows.jsonl to have one table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from calidrop.eval.encode import encode, until
from calidrop.eval.jsonl import load
from calidrop.eval.rows import Row, append, empty, key_of
from calidrop.eval.sample import QUESTIONS, Sample
from calidrop.eval.score import METRICS, score


class Asked:
    """A model with a cache that a press filled: it keeps fewer tokens than were seen, so positions are counted here."""

    def __init__(self, model: Any, cache: Any, seen: int, logits: Tensor, prefill_s: float | None = None):
        """logits: of what comes next, [vocabulary]"""
        self.model, self.cache, self.seen, self.logits, self.prefill_s = model, cache, seen, logits, prefill_s

    @staticmethod
    def alone(model: Any, press: Any, prompt: Tensor) -> Asked:
        from transformers import DynamicCache

        cache, start = DynamicCache(config=model.config), time.perf_counter()
        with press(model) if press else nullcontext():
            out = model(prompt[None], past_key_values=cache, logits_to_keep=1)
        return Asked(model, cache, len(prompt), out.logits[0, -1], time.perf_counter() - start)

    @staticmethod
    def together(model: Any, presses: dict[str, Any], prompt: Tensor) -> dict[str, Asked]:
        """One prefill for presses that only choose from what a layer's attention has written into the cache, as their
        hooks do after it: each press fills a cache of its own. None: keeps all."""
        from transformers import DynamicCache

        caches = {name: DynamicCache(config=model.config) for name in presses}

        def fill(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            for name, press in presses.items():
                k, v = layer.keys, layer.values
                if press:
                    k, v = press.compress(module, kwargs["hidden_states"], k, v, output[1], kwargs)
                caches[name].update(k, v, module.layer_idx)

        hooks = []
        for press in filter(None, presses.values()):
            press.post_init_from_model(model)
        for layer in model.model.layers:
            layer.self_attn.rotary_emb = model.model.rotary_emb  # which presses ask for
            hooks.append(layer.self_attn.register_forward_hook(fill, with_kwargs=True))
        try:
            out = model(prompt[None], past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: Asked(model, cache, len(prompt), out.logits[0, -1]) for name, cache in caches.items()}

    def step(self, token: int) -> Tensor:
        at = torch.tensor([[self.seen]])
        out = self.model(torch.tensor([[token]]), past_key_values=self.cache, position_ids=at)
        self.seen, self.logits = self.seen + 1, out.logits[0, -1]
        return self.logits

    def forced(self, tokens: list[int]) -> Tensor:
        """The logits that predict each of them, [n,vocabulary]; the cache stays as it was."""
        kept = self.seen, self.logits, copy.deepcopy(self.cache)
        out = torch.stack([self.logits, *(self.step(token) for token in tokens[:-1])])
        self.seen, self.logits, self.cache = kept
        return out

    def generated(self, new: int, ends: set[int]) -> tuple[list[int], list[float]]:
        tokens, seconds = [int(self.logits.argmax())], []
        while len(tokens) < new and tokens[-1] not in ends:
            start = time.perf_counter()
            self.step(tokens[-1])
            seconds.append(time.perf_counter() - start)
            tokens.append(int(self.logits.argmax()))
        return tokens, seconds

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for layer in self.cache.layers for x in (layer.keys, layer.values))


def key(s: Sample, name: str, recipe: str, question: str | None, dtype: torch.dtype) -> str:
    return key_of(s, name, recipe, question, {"dtype": str(dtype)})


def press_of(name: str, share: float) -> Any:
    """A press of kvpress by its name, or one in another that takes it: "AdaKVPress(SnapKVPress)"."""
    import kvpress

    outer, _, inner = name.removesuffix(")").partition("(")
    if inner:
        return getattr(kvpress, outer)(press_of(inner, share))
    return getattr(kvpress, outer)(compression_ratio=share)


def only_chooses(press: Any) -> bool:
    import kvpress

    return isinstance(press, kvpress.ScorerPress)


@torch.inference_mode()
def rows(
    model: Any, tokenizer: Any, name: str, s: Sample, question: str | None, presses: dict[str, Any]
) -> Iterator[Row]:
    prompt, later, gold = encode(tokenizer, s, question)
    ends, full, full_bytes = {tokenizer.eos_token_id}, None, 0
    presses = {"kvpress:full": None, **presses}
    shared = {recipe: press for recipe, press in presses.items() if press is None or only_chooses(press)}
    ready = Asked.together(model, shared, torch.tensor(prompt))
    for recipe, press in presses.items():
        asked = ready.pop(recipe) if recipe in ready else Asked.alone(model, press, torch.tensor(prompt))
        for token in later:
            asked.step(token)
        logits = asked.forced(gold).double().log_softmax(-1)
        tokens, seconds = asked.generated(s.max_new_tokens, ends)
        full, full_bytes = (logits, asked.nbytes) if full is None else (full, full_bytes)
        row = empty(s, name, recipe, question, key(s, name, recipe, question, model.dtype))
        row.prediction = until(tokenizer.decode(tokens, skip_special_tokens=True), s.stop)
        row.nll, row.answer_tokens = -float(logits.gather(1, torch.tensor(gold)[:, None]).sum()), len(gold)
        p, q = full[0 if later else 1 :], logits[0 if later else 1 :]
        if len(p):
            kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
            row.kl, row.kl_p95 = float(kl.mean()), float(kl.quantile(0.95))
            row.agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
        row.score = score(s.metric, row.prediction, s.answers, s.classes) if s.metric in METRICS else row.agreement
        row.device_bytes, row.host_bytes, row.full_bytes, row.recompute_rate = asked.nbytes, 0, full_bytes, 0.0
        row.prefill_s = asked.prefill_s
        row.decode_ms_per_token = 1000 * median(seconds[1:]) if len(seconds) > 1 else None
        row.versions = {n: importlib.metadata.version(n) for n in ("kvpress", "torch", "transformers")}
        row.time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", required=True, help="a folder or hub id")
    parser.add_argument("--name", help="what rows call it; default: as --model")
    parser.add_argument("--press", action="append", required=True, help="like SnapKVPress=0.9; several times")
    parser.add_argument("--question", action="append", choices=QUESTIONS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    presses = {f"kvpress:{name}({share})": press_of(name, float(share))
               for name, _, share in (press.partition("=") for press in args.press)}  # fmt: skip
    dtype = torch.float32
    made = {json.loads(line)["key"] for line in args.out.open()} if args.out.exists() else set()
    samples = load(args.prompts)
    if unfit := {s.task for s in samples if not s.gold or s.metric == "same_start"}:
        parser.error(f"{', '.join(unfit)}: the gold answer must be a text")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for i, s in enumerate(samples):
        for question in s.modes(tuple(args.question or ["seen"])):
            name = args.name or args.model
            left = {r: p for r, p in presses.items() if key(s, name, r, question, dtype) not in made}
            if left:
                append(args.out, rows(model, tokenizer, name, s, question, left))
        print(f"{i + 1} of {len(samples)}", flush=True)


if __name__ == "__main__":
    main()
