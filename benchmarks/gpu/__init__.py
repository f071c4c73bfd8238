"""What the library does on a GPU: kernels against their oracles and against the memory's bandwidth, and a model of the
shape of Llama-3.1-8B with random weights against transformers' DynamicCache in the same run."""
