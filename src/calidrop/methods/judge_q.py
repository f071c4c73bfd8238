from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from calidrop import budgets
from calidrop.methods import _artefact
from calidrop.observe import Observation
from calidrop.parts import Evictor, Layer, check_budget, check_choice, check_int, method
from calidrop.store import Score
from calidrop.tokens import Tokens

SHIPPED = "judge_q-smollm2.safetensors"


class SoftTokens:
    """What one training wrote. rows: [n,hidden], what the first layer is given for each soft token. samples: a few key
    weights of each layer."""

    def __init__(self, meta: dict[str, Any], rows: Tensor, samples: Tensor):
        self.meta, self.rows, self.samples = meta, rows, samples

    def save(self, file: Path) -> None:
        _artefact.save("judge_q", file, self.meta, {"rows": self.rows.half(), "samples": self.samples})

    @staticmethod
    def load(file: str) -> SoftTokens:
        """Raises ValueError for a file that is not there or not one of these."""
        meta, data = _artefact.load("judge_q", file)
        return SoftTokens(meta, data["rows"].float(), data["samples"])

    def check(self, layer: Layer) -> None:
        """Raises ValueError for a layer of another model."""
        _artefact.check_shape("judge_q", self.meta, layer)
        _artefact.check_weights("judge_q", self.meta, self.samples, layer)


class SoftAttention(Score):
    """What the soft tokens behind the prompt attend to, on average."""

    def __init__(self, kernel: int, group: str):
        self.kernel, self.group = kernel, group

    def __call__(self, t: Tokens, obs: Observation) -> Tensor:
        if obs.soft is None:
            raise RuntimeError("judge_q: a prompt came without its soft tokens: it did not go through the decoder")
        weights = obs.soft.weights(t, self.group).mean(2)
        return F.avg_pool1d(weights, self.kernel, 1, self.kernel // 2)


@method("Judge Q, arXiv 2509.10798")
def judge_q(
    budget: int | float, file: str | None = None, recent: int = 0, kernel: int = 1, group: str = "mean"
) -> Evictor:
    """Judge Q (arXiv 2509.10798, sec. 3): the prompt tokens that trained soft tokens behind the prompt attend to; they
    were taught to attend as the response will (`calidrop train judge-q`).

    file: what the training wrote, for this model only; None: the one shipped for the embedded model. recent: the last
    tokens of the prompt, always kept and counted in the budget. kernel: width of the average pooling over positions.
    group: what is taken of the query heads of a kv head, their "mean" or "max". Soft tokens see the prompt and those
    before them; the softmax is over all of that, as it will be for the response. They run in the pass that attends
    the prompt (in plain calls: every block of it) and leave nothing behind. Only prompts are compressed.

    Deviations: the paper says nothing of pooling and of groups; both are measured in LOG.md.
    """
    check_budget("judge_q", budget, recent)
    check_int("judge_q: kernel", kernel, 1)
    if kernel % 2 == 0:
        raise ValueError(f"judge_q: kernel must be odd, got {kernel}")
    check_choice("judge_q: group", group, ("mean", "max"))
    if file is not None and not isinstance(file, str):
        raise ValueError(f"judge_q: file must be a path in quotes, got {file!r}")
    soft = SoftTokens.load(str(resources.files("calidrop") / "data" / SHIPPED) if file is None else file)

    def score(layer: Layer) -> Score:
        try:
            soft.check(layer)
        except ValueError as error:
            hint = "; train soft tokens for it with: calidrop train judge-q --model MODEL --out FILE, and name the FILE"
            raise ValueError(f"{error}{hint if file is None else ''}") from None
        return SoftAttention(kernel, group)

    return Evictor(score=score, amount=budgets.amount(budget, recent), recent=recent, every=None, soft=soft.rows)
