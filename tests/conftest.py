import os

# Read by libraries as they are imported: before torch and transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

import typecheck
from browser import browser, chromium  # noqa: F401  fixtures

typecheck.install(*(f"calidrop.{x}" for x in ("tokens", "attention", "observe", "store", "budgets")))

torch.set_num_threads(1)  # xdist runs one process per core
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported, by the first test that asks for a kernel


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """`(model, tokenizer)`: the embedded default, float32, on the CPU. Who uses it is slow, and leaves it as it was."""
    from calidrop.models import load

    return load(device="cpu")
