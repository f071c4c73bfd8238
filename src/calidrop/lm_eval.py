"""The model "calidrop" for lm-evaluation-harness (`pip install 'calidrop[lm-eval]'`).

python -m calidrop.lm_eval --model calidrop --model_args pretrained=smollm2,recipe='snapkv(budget=256)+int4' --tasks …

lm_eval finds models of other packages by no entry point: whoever uses it from Python imports this module first, and the
command above is its own command line with that import in front.

A context but for its last token is attended and compressed; that token and the continuation are teacher-forced through
the compressed cache as decoded tokens, so even an answer of one token is its prediction. Every continuation starts from
the state that the context left, so a context shared by several is run once.
"""

from __future__ import annotations

import logging
import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import handle_arg_string  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from calidrop.cache import KVCache
from calidrop.eval.subject import fill
from calidrop.models import load
from calidrop.plugin import using
from calidrop.recipe import parse

if TYPE_CHECKING:  # lm_eval need not be there where types are checked
    HFLM: Any = object
else:
    from lm_eval.models.huggingface import HFLM

log = logging.getLogger(__name__)
Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("calidrop")
class CalidropLM(HFLM):
    """pretrained: as for `calidrop.load`. recipe: what the cache does. The rest as for lm_eval's "hf"; batches are for
    generating, likelihoods are asked one context at a time. Raises ValueError for a recipe that makes no sense or does
    not fit the model."""

    def __init__(
        self,
        pretrained: str = "smollm2",
        recipe: str = "full",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | None = 1,
        **kwargs: Any,
    ):
        self.recipe = str(parse(recipe))
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            log.warning("no CUDA device here: running on the CPU")  # "cuda:0" is lm_eval's default, not a choice
            device = None
        model, tokenizer = load(pretrained, device=device, dtype=dtype)
        KVCache(model, self.recipe)
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size or 1, **kwargs)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> CalidropLM:
        """As the command line reads it: commas inside of brackets split nothing."""
        given = dict(item.split("=", 1) for item in re.split(r",(?![^()\[\]{}]*[)\]}])", arg_string))
        return cls.create_from_arg_obj(
            {name: handle_arg_string(value) for name, value in given.items()}, additional_config
        )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        cut = [self._cut(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(cut)), key=lambda i: cut[i])
        out: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for context, same in groupby(order, key=lambda i: cut[i][0]):
            for i, result in zip(mine := list(same), self._continue(context, [cut[i][1] for i in mine]), strict=True):
                out[i] = result
                self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
            bar.update(len(mine))
        bar.close()
        return [out[i] for i in range(len(requests))]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """As lm_eval's "hf" cuts what is too long: at its front; the last token is only predicted."""
        whole = (context + continuation)[-(self.max_length + 1) :]
        return whole[: len(whole) - len(continuation)], continuation

    @torch.inference_mode()
    def _continue(self, context: list[int], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        if not context:
            raise ValueError(f"a continuation fills all {self.max_length} tokens: no context is left")
        ids = torch.tensor(context, device=self.device)
        (subject,) = fill(self.model, [self.recipe], ids[: max(1, len(ids) - 1)])
        first = subject.feed(ids[-1:])[-1] if len(ids) > 1 else subject.logits
        saved, out = subject.saved(), []
        for continuation in continuations:
            subject.restore(saved)
            target = torch.tensor(continuation, device=self.device)
            rest = subject.feed(target[:-1]) if len(target) > 1 else first[None, :][:0]
            logits = torch.cat([first[None], rest]).float()
            logp = logits.log_softmax(-1).gather(1, target[:, None]).sum()
            out.append((float(logp), bool((logits.argmax(-1) == target).all())))
        return out

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, **using(KVCache(self.model, self.recipe)), **kwargs)

    def get_model_info(self) -> dict:
        return {**super().get_model_info(), "recipe": self.recipe}


if __name__ == "__main__":
    cli_evaluate()
