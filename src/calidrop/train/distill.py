"""G-KV's distillation (arXiv 2512.00504): the full cache teaches the model that sees the compressed one.

Teacher: the model without its adapter and with every token. Student: the same with the adapter, every row seeing what
generation under the recipe would have left it. L = T² KL(softmax(z_T / T) ‖ softmax(z_S / T)), summed over the answer's
tokens, mean over the batch. The logits that predict a token are those of the column before it, so the answer's first
token counts and nothing after its last.

Deviations: a LoRA adapter on all linear layers instead of all weights (and its learning rate); the reference answers of
the data instead of the model's own correct ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import pad

from calidrop.parts import check_int, check_number
from calidrop.train._gsm8k import Row, answered, asked
from calidrop.train._lora import Job, Progress, lora, split
from calidrop.train._sparse import SparseCache, check_sparse, under
from calidrop.train._text import digest

Batch = dict[str, Any]


def collate(pad_id: int, features: list[Batch]) -> Batch:
    """Pads, prompt, answer, pads: the prompt ends in the same column of every row. labels are -100 in the prompt."""
    ids = [torch.tensor(f["input_ids"]) for f in features]
    ends = [int((torch.tensor(f["labels"]) != -100).int().argmax()) for f in features]
    if not all(ends):  # no label at all, or none in front of the answer
        raise ValueError("a row's prompt leaves no room for an answer: shorten it")
    prompts = pad([x[:n] for x, n in zip(ids, ends, strict=True)], -1, "left")
    answers = pad([x[n:] for x, n in zip(ids, ends, strict=True)], -1, "right")
    both = torch.cat([prompts, answers], 1)
    mask = (both >= 0).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": both.where(both >= 0, pad_id), "attention_mask": mask, "position_ids": position,
        "prompt": prompts.shape[1],
    }  # fmt: skip


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL in nats of the last dim, fp32."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def both(model: Any, batch: Batch, recipe: Any) -> tuple[Tensor, Tensor, Tensor]:
    """model: with its adapter. -> the teacher's and the student's logits for the answer [B,n,vocabulary], and which of
    them predict a real token [B,n]."""
    call = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    n = call["input_ids"].shape[1] - batch["prompt"]
    call |= {"use_cache": False, "logits_to_keep": n + 1}
    base = model.get_base_model()
    with torch.no_grad(), model.disable_adapter():
        teacher = model(**call).logits[:, :-1]
    with under(base, SparseCache(base, recipe, batch["prompt"])):
        student = model(**call).logits[:, :-1]
    return teacher, student, call["attention_mask"][:, -n:].bool()


class Distiller(SFTTrainer):
    """TRL's trainer for prompts with answers, with another loss."""

    def __init__(self, *args: Any, recipe: Any, temperature: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recipe, self.temperature = recipe, temperature
        self.model_accepts_loss_kwargs = False  # the loss is a mean over rows, which accumulated steps average

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        teacher, student, real = both(self.accelerator.unwrap_model(model), inputs, self.recipe)
        T = self.temperature
        loss = T * T * divergence(teacher / T, student / T)[real].sum() / len(real)
        return (loss, None) if return_outputs else loss


@torch.no_grad()
def measure(model: Any, batches: Iterator[Batch], recipe: Any) -> dict[str, float]:
    """Per answer token of held-out rows, at temperature 1: KL to the full cache, and how often the likeliest is the
    same."""
    kl = agree = n = 0.0
    for batch in batches:
        teacher, student, real = both(model, batch, recipe)
        kl += float(divergence(teacher, student)[real].sum())
        agree += float((teacher.argmax(-1) == student.argmax(-1))[real].sum())
        n += float(real.sum())
    return {"kl": kl / n, "agreement": agree / n, "tokens": n}


def train(
    model: Any,
    tokenizer: Any,
    data: list[Row],
    out: Path,
    recipe: str,
    *,
    held_out: int = 24,
    steps: int = 40,
    batch: int = 4,
    rate: float = 2e-4,
    temperature: float = 0.6,
    rank: int = 16,
    length: int = 512,
    seed: int = 0,
    name: str = "",
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train on all but the last `held_out` rows, and write a PEFT adapter into the folder `out`. -> what is written
    beside it: model, settings, KL on the held-out rows before and after, the log.

    recipe: g_kv(...) as it will be used. batch: rows a step. rate: peak learning rate, a cosine after a warm-up of 5 %.
    length: tokens after which a row is cut. name, command: written into the folder. A killed run continues from `out`
    .part. Raises ValueError for a recipe that does more than evict, and where `out` or its .part is something else's.
    """
    for what, value in (("steps", steps), ("batch", batch), ("rank", rank), ("length", length)):
        check_int(what, value, 1)
    check_number("rate", rate, 0.0)
    check_number("temperature", temperature, 1e-3)
    rows, held = split(data, held_out)
    settings = {"method": "distill", "name": name, "recipe": str(check_sparse(recipe))}
    settings |= {
        "rows": len(data),
        "data": digest(data),
        "held_out": held_out,
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "temperature": temperature,
    }
    settings |= {"rank": rank, "length": length, "seed": seed}
    job = Job(model, out, settings, command)
    sets = [Dataset.from_list([{"prompt": asked(row), "completion": answered(row)} for row in part])
            for part in (rows, held)]  # fmt: skip
    cpu = model.device.type == "cpu"
    config = SFTConfig(
        **job.arguments(steps, batch, rate, seed, cpu), lr_scheduler_type="cosine", max_length=length,
        eval_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = Distiller(
        model, config, train_dataset=sets[0], eval_dataset=sets[1], processing_class=tokenizer, peft_config=lora(rank),
        data_collator=lambda rows: collate(tokenizer.pad_token_id, rows), recipe=recipe, temperature=temperature,
    )  # fmt: skip

    def check() -> dict[str, float]:
        batches = (trainer._prepare_inputs(b) for b in trainer.get_eval_dataloader())
        return measure(trainer.model, batches, recipe)

    job.measured(check)
    job.run(trainer, "distilling", progress)
    return job.finish(trainer, check())
