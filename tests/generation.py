"""The trace of text generation."""

from typing import TYPE_CHECKING

import torch
from theloom.memory.storages import LiveStorages
from theloom.memory.trace import CUDA_KERNELS, MarkedCache, grow_cache
from theloom.model.fake import FakeModel
from theloom.model.without_bytes.shapes_only import shapes_only

if TYPE_CHECKING:
    pass


def generation(fake: FakeModel, windows: int, prompt: int, new_tokens: int) -> LiveStorages:
    """All births and ends of storages while text is generated on a CUDA device, as the allocator's
    replay takes them.

    The prompt of so many tokens goes through in one pass with the KV cache, and the LM head, if the
    model has one, sees its last token alone. Of the steps of one token that follow, only the last
    is traced, with the KV cache that the others have left: it is the largest of them.
    """
    model = fake.architecture.model
    live = LiveStorages(whole=CUDA_KERNELS)
    with fake.mode, shapes_only(), torch.inference_mode():
        ids, token = (
            torch.zeros(windows, prompt, dtype=torch.int64),
            torch.zeros(windows, 1, dtype=torch.int64),
        )
        live.ignore([ids, token, *model.parameters(), *model.buffers()])
        options = {"logits_to_keep": 1} if model.get_output_embeddings() is not None else {}
        with live:
            cache = MarkedCache(config=model.config)
            cache.live = live
            model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
            if new_tokens > 2:
                grow_cache(cache, new_tokens - 2, 1)
            if new_tokens > 1:
                model(input_ids=token, past_key_values=cache, use_cache=True, **options)
            del cache
    return live
