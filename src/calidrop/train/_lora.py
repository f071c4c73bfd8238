"""What LoRA trainings have in common: arguments, checkpoints a killed run continues from, and the finished folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from calidrop import __version__
from calidrop.adapter import ABOUT, check_same, facts
from calidrop.parts import check_int
from calidrop.train._gsm8k import Row

CHECKPOINTING = (  # its name since transformers 5.24. TRL turns it on, but no cache goes with it
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
Progress = Callable[[str, int, int], None]
"""(stage, done, total)"""


def lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def split(data: list[Row], held_out: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and the last ones, to measure on."""
    check_int("held_out", held_out, 1)
    if len(data) <= held_out:
        raise ValueError(f"data: need more than the {held_out} rows that are held out, got {len(data)}")
    return data[:-held_out], data[-held_out:]


class Job:
    """A training that writes the folder `out`, with checkpoints in `out`.part until it is done. Raises ValueError where
    those are another run's, `out` exists, or several processes train.

    settings: everything the result depends on. every: steps between checkpoints; what came after one is done again."""

    def __init__(self, model: Any, out: Path, settings: dict[str, Any], command: str, every: int = 5):
        if out.exists():
            raise ValueError(f"{out} exists: delete it or choose another output")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"train in one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}")
        self.out, self.part, self.every = out, out.with_name(out.name + ".part"), every
        self.about = {"model": facts(model), "settings": settings, "command": command, "version": __version__}
        if self._last():
            before = json.loads((self.part / ABOUT).read_text())
            check_same(str(self.part), before["model"], self.about["model"])
            for name, mine in settings.items():
                theirs = before["settings"].get(name)
                if theirs != mine:
                    raise ValueError(
                        f"{self.part} is of another run: {name} was {theirs!r}, now {mine!r}; delete it or choose "
                        "another output"
                    )
            self.about["before"] = before["before"]
        else:
            self.part.mkdir(parents=True, exist_ok=True)
            self._write()

    def _last(self) -> Path | None:
        """The newest checkpoint. Its state is written last: one without it is of a run that was killed as it wrote."""
        whole = [p.parent for p in self.part.glob("checkpoint-*/trainer_state.json")]
        return max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)

    def _write(self) -> None:
        beside = self.part / (ABOUT + ".new")
        beside.write_text(json.dumps(self.about) + "\n")
        beside.replace(self.part / ABOUT)

    def measured(self, before: Callable[[], dict[str, float]]) -> None:
        """What is measured before the training, once."""
        if self.about.get("before") is None:
            self.about["before"] = before()
            self._write()

    def arguments(self, steps: int, batch: int, rate: float, seed: int, cpu: bool) -> dict[str, Any]:
        return {
            "output_dir": str(self.part), "max_steps": steps, "per_device_train_batch_size": batch,
            "learning_rate": rate, "warmup_steps": steps // 20, "seed": seed, "max_grad_norm": 1.0,
            "save_steps": self.every, "save_total_limit": 2, "logging_steps": 1, "report_to": "none",
            "disable_tqdm": True, CHECKPOINTING: False, "bf16": not cpu, "use_cpu": cpu,
            "dataloader_pin_memory": not cpu,
        }  # fmt: skip

    def run(self, trainer: Any, stage: str, progress: Progress | None) -> None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Tell(stage, progress))
        last = self._last()
        trainer.train(resume_from_checkpoint=None if last is None else str(last))

    def finish(self, trainer: Any, after: dict[str, float]) -> dict[str, Any]:
        """Write the adapter and what is known about it. -> the latter."""
        beside = self.part / "adapter"
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(str(beside))
        self.about |= {"after": after, "log": trainer.state.log_history}
        (beside / ABOUT).write_text(json.dumps(self.about, indent=1) + "\n")
        beside.rename(self.out)
        shutil.rmtree(self.part)
        return self.about


class _Tell(TrainerCallback):
    def __init__(self, stage: str, progress: Progress | None):
        self.stage, self.progress = stage, progress or (lambda *_: None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(self.stage, state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Path(args.output_dir, "log.json").write_text(json.dumps(state.log_history, indent=1) + "\n")
