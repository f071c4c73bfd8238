"""Rows of kvpress beside our own, from the same prompts and by the same scores. kvpress needs an older transformers, so
this runs in an environment of its own, and takes nothing of calidrop but what is plain Python.

calidrop eval --task needle --length 1024 --dump-prompts prompts.jsonl
python -m venv kv && kv/bin/pip install kvpress==0.5.5
kv/bin/python benchmarks/kvpress_rows.py --prompts prompts.jsonl --model MODEL --press SnapKVPress=0.875 --out RUN

The press compresses the share that is given, like 0.875 of the prompt's tokens. Rows go to RUN/rows.jsonl as
"kvpress:SnapKVPress(0.875)"; without a press the row is "full", which KL and agreement are to. The model is loaded as
float32 on the CPU, else as bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from calidrop.eval.jsonl import load  # noqa: E402
from calidrop.eval.rows import Row, append, empty, key_of  # noqa: E402
from calidrop.eval.sample import QUESTIONS, Sample  # noqa: E402
from calidrop.eval.score import METRICS, score  # noqa: E402
from calidrop.eval.text import cut, encode, kl_of  # noqa: E402
