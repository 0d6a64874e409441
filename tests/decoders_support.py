"""Tiny encoder-decoders that read audio and write texts, with their processors and a tokenizer of
bytes, a table of clips with their texts, and the hidden states of plain transformers.
"""

import copy
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import soundfile
import torch
import transformers
from model_folders import VOCABULARY, byte_tokenizer, scaled

WIDTH, HEADS = 32, 4
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_MEL = {"feature_size": 16, "sampling_rate": 16000}
_ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "intermediate_size": 48,
    "num_mel_bins": 16,
    "subsampling_conv_channels": 8,
    "max_position_embeddings": 400,
}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_LAYERS = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_target_positions": 64,
}
_STREAMING = {"model_type": "moonshine_streaming_encoder", "sliding_windows": [[16, 4], [16, 4]]}
REFUSED: dict[str, dict[str, Any]] = {
    "moonshine_streaming": {
        **_DECODER,
        "encoder_config": {**_ENCODER, **_STREAMING},
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "whisper": {**_LAYERS, "num_mel_bins": 16, "max_source_positions": 100},
    "moonshine": {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 3,
        **{f"{half}_num_attention_heads": HEADS for half in ("encoder", "decoder")},
        **{f"{half}_num_key_value_heads": HEADS for half in ("encoder", "decoder")},
        "max_position_embeddings": 64,
    },
    "speech_to_text": {
        **_LAYERS,
        "decoder_start_token_id": 2,  # the tokenizer begins with another
        "input_feat_per_channel": 16,
        "conv_channels": 24,
        "max_source_positions": 800,
    },
    "cohere_asr": {**_DECODER, "encoder_config": {"model_type": "parakeet_encoder", **_ENCODER}},
    "canary": {
        "encoder_config": {"model_type": "parakeet_encoder", **_ENCODER},
        "decoder_config": {**_DECODER, **_IDS},
    },
}
_PROCESSORS = {
    "whisper": {"feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 2, **_MEL},
    "moonshine": {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": False,
        "return_attention_mask": True,
    },
    "speech_to_text": {
        "feature_extractor_type": "Speech2TextFeatureExtractor",
        "num_mel_bins": 16,
        **_MEL,
    },
    "cohere_asr": {"feature_extractor_type": "CohereAsrFeatureExtractor", **_MEL},
    "canary": {"feature_extractor_type": "ParakeetFeatureExtractor", **_MEL},
}

# of each document: its text and the samples of its clip; two have no text and one no sound
TEXTS = ["some words", "a", "other words, and more of them", "bb", "", "ccc", None, "d", "no", "é"]
SAMPLES = [16000, 9600, 16000, 20011, 16000, 16000, 16000, 16000, 0, 16000]


def config_of(kind: str, **more: Any) -> transformers.PretrainedConfig:
    """The config of a tiny model."""
    values = {"vocab_size": VOCABULARY, **_IDS, **(CONFIGS | REFUSED)[kind], **more}
    return transformers.AutoConfig.for_model(kind, **copy.deepcopy(values))


def build(kind: str, folder: Path, **more: Any) -> Path:
    """Write a tiny model, the config of its processor, and a tokenizer into a folder."""
    config = config_of(kind, **more)
    scaled(transformers.AutoModelForSpeechSeq2Seq.from_config(config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(_PROCESSORS[kind.partition("_streaming")[0]])
    )
    byte_tokenizer(folder)
    return folder


def clip(samples: int, seed: int = 0) -> bytes:
    """A sound of noise as the bytes of a WAV file."""
    content = io.BytesIO()
    values = np.random.default_rng(seed).normal(0, 0.1, samples)
    soundfile.write(content, values, 16000, format="WAV")
    return content.getvalue()


def write_table(file: Path, texts: Sequence[str | None], samples: Sequence[int]) -> Path:
    """Write clips and their texts as a table, as `datasets` does."""
    cells = [{"bytes": clip(n, seed), "path": None} for seed, n in enumerate(samples)]
    pa.parquet.write_table(pa.table({"audio": cells, "text": list(texts)}), file)
    return file


class Plain:
    """The plain model of transformers with its own processor.

    Args:
        folder: of the model.
        dtype: of the model.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        found = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=dtype)
        self.model = found.eval()
        self._processor = transformers.AutoFeatureExtractor.from_pretrained(folder)

    def values(self, content: bytes, ids: list[int]) -> dict[str, torch.Tensor]:
        """The decoder's own hidden states of one clip and one target, and what goes into and comes
        out of its cross-attention, by hook point, (tokens, width) each.
        """
        values, rate = soundfile.read(io.BytesIO(content), dtype="float32")
        inputs = dict(self._processor(values, sampling_rate=rate, return_tensors="pt"))
        main = self.model.main_input_name
        inputs = {
            name: value.to(self.model.dtype) if name == main else value
            for name, value in inputs.items()
        }
        found: dict[str, torch.Tensor] = {}
        handles = [
            module.register_forward_hook(partial(self._keep, found, f"decoder.blocks.{n}.{name}"))
            for n, layer in enumerate(self.model.model.decoder.layers)
            for name, module in (
                ("hook_cross_attn_out", layer.encoder_attn),
                ("hook_resid_post", layer),
            )
        ]
        with torch.no_grad():
            output = self.model(
                **inputs, decoder_input_ids=torch.tensor([ids]), output_hidden_states=True
            )
        for handle in handles:
            handle.remove()
        *states, last = output.decoder_hidden_states
        for n, state in enumerate(states):
            found[f"decoder.blocks.{n}.hook_resid_pre"] = state[0]
            if n:  # the model's own words on what the hooks above have seen
                torch.testing.assert_close(
                    found[f"decoder.blocks.{n - 1}.hook_resid_post"], state[0], rtol=0, atol=0
                )
        found["decoder.ln_final.hook_out"] = last[0]
        return found

    @staticmethod
    def _keep(found: dict[str, torch.Tensor], name: str, _: Any, __: Any, output: Any) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output)[0]
