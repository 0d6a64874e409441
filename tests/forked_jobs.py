"""What the server of `support.forked` imports before it forks."""

import gc

import layerwise_support  # noqa: F401
import theloom.engine.layerwise.shard  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

gc.collect()
gc.freeze()  # a collection in a job copies none of it
