"""One model and its compressed cache in several processes: a share of the heads in each, or of the layers.

torchrun --nproc-per-node 3 examples/tensor_parallel.py                          # the embedded default has 3 kv heads
torchrun --nproc-per-node 2 examples/tensor_parallel.py --model Qwen/Qwen3-8B
torchrun --nproc-per-node 2 examples/tensor_parallel.py --pipeline               # layers instead of heads
"""

import argparse
import os

import torch.distributed as dist
from transformers.distributed import DistributedConfig

import calidrop
from calidrop.plugin import using

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a hub id or a folder")
parser.add_argument("--recipe", default="adakv(budget=64, recent=16)+calidrop")
parser.add_argument("--pipeline", action="store_true")
args = parser.parse_args()
if "WORLD_SIZE" not in os.environ:
    parser.error("start it with torchrun")

size = {"pp_size" if args.pipeline else "tp_size": int(os.environ["WORLD_SIZE"])}
model, tokenizer = calidrop.load(args.model, distributed_config=DistributedConfig(**size))
cache = calidrop.KVCache(model, args.recipe)

hill = "The house stood on a hill above the river, and in the evening its windows could be seen from far away. "
inputs = tokenizer(f"The secret word is banana. {12 * hill}\nThe secret word is", return_tensors="pt").to(model.device)
out = model.generate(**inputs, **using(cache), max_new_tokens=8)  # the same call in every process

for rank in range(dist.get_world_size()):
    dist.barrier()  # one after the other
    if rank == dist.get_rank():
        print(f"process {rank}:", *cache.describe().splitlines()[:2], sep="\n  ", flush=True)
dist.barrier()
if dist.get_rank() == 0:
    print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
dist.destroy_process_group()
