"""One file per method. A new method is a builder function, and one line here."""

from calidrop.methods.adakv import adakv
from calidrop.methods.attention_predictor import attention_predictor
from calidrop.methods.calidrop import calidrop
from calidrop.methods.decoquant import decoquant
from calidrop.methods.expected_attention import expected_attention
from calidrop.methods.fp8 import fp8
from calidrop.methods.full import full
from calidrop.methods.g_kv import g_kv
from calidrop.methods.h2o import h2o
from calidrop.methods.int4 import int4
from calidrop.methods.int8 import int8
from calidrop.methods.judge_q import judge_q
from calidrop.methods.kivi import kivi
from calidrop.methods.kvcrush import kvcrush
from calidrop.methods.lazy_eviction import lazy_eviction
from calidrop.methods.mikv import mikv
from calidrop.methods.mixkvq import mixkvq
from calidrop.methods.ott import ott
from calidrop.methods.pyramidkv import pyramidkv
from calidrop.methods.r_kv import r_kv
from calidrop.methods.recalkv import recalkv
from calidrop.methods.snapkv import snapkv
from calidrop.methods.streaming_llm import streaming_llm
from calidrop.methods.think import think
from calidrop.methods.tova import tova

METHODS = {
    build.__name__: build
    for build in (
        full,
        *(streaming_llm, h2o, tova, snapkv, expected_attention, pyramidkv, adakv),
        *(judge_q, lazy_eviction, g_kv, r_kv, attention_predictor),
        *(kivi, int8, int4, fp8, ott, mixkvq, decoquant, think, recalkv),
        *(kvcrush, calidrop, mikv),
    )
}
