"""Hidden states of a model that you have loaded, in your own code, without files."""

from theloom.extraction.api import (
    collect_streaming_results,
    extract_hidden_states,
    extract_inference_optimized,
    extract_streaming,
    extract_with_checkpointing,
)
from theloom.extraction.generated import GeneratedStates, extract_generated
from theloom.extraction.result import HiddenStates, Rows

__all__ = [
    "GeneratedStates",
    "HiddenStates",
    "Rows",
    "collect_streaming_results",
    "extract_generated",
    "extract_hidden_states",
    "extract_inference_optimized",
    "extract_streaming",
    "extract_with_checkpointing",
]
