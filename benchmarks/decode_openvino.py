"""Steps of OpenVINO GenAI, timed in an environment of its own that `benchmarks.decode --openvino PYTHON` starts.

python -m venv ov && ov/bin/pip install openvino-genai
python -m benchmarks.decode --openvino ov/bin/python --contexts 8192 --batches 4

Takes nothing of calidrop. Reads a job as JSON on stdin: gguf (file), ids [T], batch, threads, rounds, steps, kept
tokens. Writes JSON: the versions, and for its cache as it is and with its cache eviction the seconds of each step (of
the whole batch, as its own metrics have them); the bytes, which it does not tell, are null. Weights stay in the file's
4 bits and the cache in OpenVINO's default precision for the device, which is not the fp32 of the other rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

import numpy as np


def main() -> None:
    job = json.load(sys.stdin)
    import openvino
    import openvino_genai as genai

    ids = openvino.Tensor(np.array([job["ids"]], dtype=np.int64))
    evicting = genai.CacheEvictionConfig(
        start_size=32, recent_size=128, max_cache_size=job["kept"], aggregation_mode=genai.AggregationMode.NORM_SUM
    )
    seconds: dict[str, list[float]] = {}
    for name, config in {"its cache": None, f"cache eviction to {job['kept']} tokens": evicting}.items():
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = 6, False
        scheduler.max_num_batched_tokens = len(job["ids"]) * job["batch"]
        if config is not None:
            scheduler.use_cache_eviction, scheduler.cache_eviction_config = True, config
        pipe: Any = genai.ContinuousBatchingPipeline(
            job["gguf"], scheduler, "CPU", {"INFERENCE_NUM_THREADS": job["threads"]}
        )
        asked = genai.GenerationConfig()
        asked.max_new_tokens = job["rounds"] * job["steps"] + 3
        asked.ignore_eos, asked.do_sample, asked.apply_chat_template = True, False, False
        found = pipe.generate([ids] * job["batch"], [asked] * job["batch"])[0]
        steps = found.perf_metrics.raw_metrics.token_infer_durations  # microseconds; the first is the prompt's
        seconds[name] = [us / 1e6 for us in list(steps)[3:]]
        del pipe, found
    versions = {name: importlib.metadata.version(name) for name in ("openvino", "openvino-genai")}
    json.dump({"versions": versions, "seconds": seconds, "bytes": dict.fromkeys(seconds)}, sys.stdout)


if __name__ == "__main__":
    main()
