"""What benchmarks of prompts have in common: the model, a book's tokens, and a line that says on what they ran."""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import calidrop


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a folder or hub id; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--recipe", action="append", help="default: a selection")
    parser.add_argument("--dtype", help="of the weights; default: float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)


def begin(args: argparse.Namespace) -> tuple[Any, Tensor, str]:
    """The model, The Time Machine [1,T], and versions, dtype and threads in words. Turns gradients off."""
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model, tokenizer = calidrop.load(args.model, device="cpu", dtype=args.dtype)
    text = (files("calidrop") / "data" / "time_machine.txt").read_text()
    tokens = torch.tensor([tokenizer(text, verbose=False)["input_ids"]])
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return model, tokens, f"{versions}, {str(model.dtype).removeprefix('torch.')}, {args.threads} threads"
