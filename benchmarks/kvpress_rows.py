"""Rows of kvpress beside our own, from the same prompts and by the same scores. kvpress needs an older transformers, so
this runs in an environment of its own, and takes nothing of calidrop but what is plain Python.

calidrop eval --task needle --length 1024 --samples 5 --dump-prompts prompts.jsonl
python -m venv kv && kv/bin/pip install kvpress==0.5.5
kv/bin/python benchmarks/kvpress_rows.py --prompts prompts.jsonl --model FOLDER --press SnapKVPress=0.9 --out rows.jsonl

The press drops the share that is given of the prompt's tokens. Rows are called "kvpress:SnapKVPress(0.9)"; that without
a press, to which KL and agreement are, "kvpress:full". Append them to a run's rows.jsonl to have one table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
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

    def __init__(self, model: Any, press: Any, prompt: Tensor):
        from transformers import DynamicCache

        self.model, self.cache, self.seen = model, DynamicCache(config=model.config), len(prompt)
        start = time.perf_counter()
        with press(model) if press else nullcontext():
            out = model(prompt[None], past_key_values=self.cache, logits_to_keep=1)
        self.prefill_s, self.logits = time.perf_counter() - start, out.logits[0, -1]

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


@torch.inference_mode()
def rows(
    model: Any, tokenizer: Any, name: str, s: Sample, question: str | None, presses: dict[str, Any]
) -> Iterator[Row]:
    prompt, later, gold = encode(tokenizer, s, question)
    ends, full, full_bytes = {tokenizer.eos_token_id}, None, 0
    for recipe, press in {"kvpress:full": None, **presses}.items():
        asked = Asked(model, press, torch.tensor(prompt))
        for token in later:
            asked.step(token)
        logits = asked.forced(gold).double().log_softmax(-1)
        tokens, seconds = asked.generated(s.max_new_tokens, ends)
        full, full_bytes = (logits, asked.nbytes) if full is None else (full, full_bytes)
        row = empty(s, name, recipe, question, key_of(s, name, recipe, question, {"dtype": str(model.dtype)}))
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
    import kvpress
    from transformers import AutoModelForCausalLM, AutoTokenizer

    presses = {f"kvpress:{name}({share})": getattr(kvpress, name)(compression_ratio=float(share))
               for name, _, share in (press.partition("=") for press in args.press)}  # fmt: skip
    samples = load(args.prompts)
    if unfit := {s.task for s in samples if not s.gold or s.metric == "same_start"}:
        parser.error(f"{', '.join(unfit)}: the gold answer must be a text")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for i, s in enumerate(samples):
        for question in s.modes(tuple(args.question or ["seen"])):
            append(args.out, rows(model, tokenizer, args.name or args.model, s, question, presses))
        print(f"{i + 1} of {len(samples)}", flush=True)


if __name__ == "__main__":
    main()
