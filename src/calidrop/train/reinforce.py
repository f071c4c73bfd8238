"""G-KV's RL-Sparse (arXiv 2512.00504): GRPO that generates and trains under the compressed cache.

Rollouts go through a `KVCache`; what each layer held after every compression is noted and is what the rows of the
training pass see. Strictly on-policy: one update per generation, no clipping, no KL to a reference; the loss is the
mean over tokens. Completions that hit the length limit are not punished: their advantage is at least 0.

Deviations: a LoRA adapter on all linear layers instead of all weights (and its learning rate); the advantage's
denominator has TRL's 1e-4 instead of 1e-8.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from calidrop.cache import KVCache
from calidrop.parts import check_int, check_number
from calidrop.plugin import using
from calidrop.train._gsm8k import Row, asked, check_answers, reward, score
from calidrop.train._lora import Job, Progress, lora, split
from calidrop.train._sparse import SparseCache, Trace, check_sparse, under
from calidrop.train._text import digest


class SparseTrainer(GRPOTrainer):
    """TRL's trainer; generation, the forward pass of the loss, and what is between them know the cache."""

    def __init__(self, *args: Any, recipe: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.base = self.accelerator.unwrap_model(self.model).get_base_model()
        self.trace: Trace | None = None

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model_wrapped)
        cache = KVCache(self.base, self.recipe)
        self.trace = Trace(cache)
        model.generate = functools.partial(model.generate, **using(cache), logits_processor=[self.trace])
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            del model.generate  # the class's own again

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        out = super()._generate_and_score_completions(inputs)
        assert self.trace is not None
        ids = out["completion_ids"]
        out["live"] = self.trace.live(out["prompt_ids"].shape[1] + ids.shape[1])
        self.trace = None
        ended = torch.isin(ids, torch.tensor(self.eos_token_ids, device=ids.device)).any(1)
        out["advantages"] = torch.where(ended, out["advantages"], out["advantages"].clamp(min=0))
        return out

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        with under(self.base, SparseCache(self.base, self.recipe, inputs["prompt_ids"].shape[1], inputs["live"])):
            return super()._compute_loss(model, inputs)


@torch.no_grad()
def measure(model: Any, tokenizer: Any, data: list[Row], recipe: Any, new: int, batch: int = 8) -> dict[str, float]:
    """Mean reward of greedy answers under the recipe, and how many are right."""
    base, got = model.eval().get_base_model(), []
    for i in range(0, len(data), batch):
        part = data[i : i + batch]
        inputs = tokenizer.apply_chat_template(
            [asked(row) for row in part], add_generation_prompt=True, return_dict=True, return_tensors="pt",
            padding=True,
        ).to(base.device)  # fmt: skip
        ids = model.generate(**inputs, **using(KVCache(base, recipe)), max_new_tokens=new, do_sample=False)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        got += [score(text, row["answer"]) for text, row in zip(texts, part, strict=True)]
    return {"reward": sum(got) / len(got), "right": sum(x == 1 for x in got) / len(got), "rows": len(got)}


def train(
    model: Any,
    tokenizer: Any,
    data: list[Row],
    out: Path,
    recipe: str,
    *,
    held_out: int = 24,
    steps: int = 20,
    prompts: int = 1,
    samples: int = 8,
    new: int = 96,
    rate: float = 1e-4,
    temperature: float = 0.8,
    rank: int = 16,
    seed: int = 0,
    name: str = "",
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train on all but the last `held_out` rows, and write a PEFT adapter into the folder `out`. -> what is written
    beside it: model, settings, reward on the held-out rows before and after, the log.

    recipe: g_kv(...) as it will be used. prompts, samples: questions a step, and answers to each. new: tokens of an
    answer at most. The reward is 1 for the right last number, else half the fraction of the reference's intermediate
    results that are mentioned. The rest as in `distill.train`.
    """
    for what, value in (("steps", steps), ("prompts", prompts), ("new", new), ("rank", rank)):
        check_int(what, value, 1)
    check_int("samples", samples, 2)
    check_number("rate", rate, 0.0)
    check_number("temperature", temperature, 1e-3)
    check_answers(data)
    rows, held = split(data, held_out)
    settings = {"method": "rl", "name": name, "recipe": str(check_sparse(recipe))}
    settings |= {
        "rows": len(data),
        "data": digest(data),
        "held_out": held_out,
        "steps": steps,
        "prompts": prompts,
        "samples": samples,
        "new": new,
    }
    settings |= {"rate": rate, "temperature": temperature, "rank": rank, "seed": seed}
    job = Job(model, out, settings, command)
    cpu = model.device.type == "cpu"
    config = GRPOConfig(
        **job.arguments(steps, samples, rate, seed, cpu), lr_scheduler_type="constant_with_warmup",
        gradient_accumulation_steps=prompts, num_generations=samples, max_completion_length=new,
        temperature=temperature, top_p=0.95, beta=0.0, loss_type="dapo",
    )  # fmt: skip
    ask = Dataset.from_list([{"prompt": asked(row), "answer": row["answer"]} for row in rows])
    trainer = SparseTrainer(
        model, reward, config, train_dataset=ask, processing_class=tokenizer, peft_config=lora(rank), recipe=recipe
    )

    def check() -> dict[str, float]:
        return measure(trainer.model, tokenizer, held, recipe, new)

    job.measured(check)
    job.run(trainer, "reinforcing", progress)
    return job.finish(trainer, check())
