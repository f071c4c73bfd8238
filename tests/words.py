"""A tokenizer of single bytes and a random model that reads them, in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_model(folder: Path) -> str:
    letters = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    bytes_ = Tokenizer(BPE(letters, []))
    bytes_.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bytes_.decoder = Decoder()
    PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(letters),
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
