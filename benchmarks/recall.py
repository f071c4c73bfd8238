"""How well the blocks that attention_predictor fetches are predicted, beside simpler ways.

python -m benchmarks.recall [--file FILE] [--text FILE] [--windows N] [--length N]
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

import torch

import calidrop
from calidrop.methods._predictor import load
from calidrop.train._text import windows
from calidrop.train.attention_predictor import recall, table

TEXT = resources.files("calidrop") / "data" / "alice.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", help="trained; default: what comes with the package")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = calidrop.load()
    ids = windows(tokenizer, args.text.read_text(), args.windows, args.length)
    predictor, meta = load(args.file)
    print(table(recall(model, ids, predictor, meta)), f"of {args.length} tokens, {args.text.name}", sep="\n")


if __name__ == "__main__":
    main()
