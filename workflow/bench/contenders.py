"""What is timed: the bare forward pass, TheLoom, and what people would use instead, each in its
documented way.

A contender is made with a model folder, layers, documents and a folder, and gives a function that
runs all documents once and returns the bytes that it wrote. Peers are installed with the extra
`bench`, and left out where they are not.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Round = Callable[[], int]
Maker = Callable[[Path, list[int], list[list[int]], Path], Round]

BATCH_TOKENS = 2048
PEERS_BATCH, CONTEXT = (
    8,
    2048,
)  # batch_size=8 is what the peers' guides use; no document is longer than the context
MOST_RUNS = 3


def bare(model: Path, layers: list[int], documents: list[list[int]], folder: Path) -> Round:
    """`AutoModelForCausalLM` on TheLoom's own batches: nothing captured, nothing written."""
    import torch
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batches = _batches(documents)

    def run() -> int:
        with torch.inference_mode():
            for ids in batches:
                causal(input_ids=ids, use_cache=False)
        return 0

    return run


def theloom_to_memory(
    model: Path, layers: list[int], documents: list[list[int]], folder: Path
) -> Round:
    """The engine's forward pass, every value kept."""
    loaded, points = load(model, layers)
    from theloom.engine.resident import ResidentRunner

    runner, batches = ResidentRunner(loaded, points, _chunk(documents), "fp32"), _batches(documents)

    def run() -> int:
        kept: list[Any] = []
        for ids in batches:
            runner.run(ids, lambda hook, start, values: kept.append(values.clone()))
        return 0

    return run


def theloom_to_disk(
    model: Path, layers: list[int], documents: list[list[int]], folder: Path
) -> Round:
    """The engine as a job runs it: a verified, crash-safe shard."""
    loaded, points = load(model, layers)
    from theloom.corpus.batching import plan_batches
    from theloom.devices.peak_memory import MemoryWatch
    from theloom.engine.batch_loop import Work, run_batches
    from theloom.engine.resident import ResidentRunner
    from theloom.memory.profile import ShardProfile
    from theloom.planning.plan import Plan
    from theloom.store.shard_file import ShardSpec, ShardTokens
    from theloom.store.writer import ShardWriter

    lengths = np.array([len(d) for d in documents])
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    numbers = np.arange(len(documents))
    tokens = ShardTokens(
        input_ids=np.concatenate([np.array(d, "<i4") for d in documents]),
        document=np.repeat(numbers, lengths).astype("<i4"),
        position=np.concatenate([np.arange(n) for n in lengths]).astype("<i4"),
        document_offset=offset,
        document_id=np.array([str(n).encode() for n in numbers]),
        window_offset=offset,
        window_document=numbers.astype("<i4"),
        first_row=0,
    )
    chunk = _chunk(documents)
    whole = Plan(BATCH_TOKENS, chunk, chunk)
    batches = plan_batches(lengths, BATCH_TOKENS, chunk)
    spec = ShardSpec(tokens, points, int(lengths.max()), "fp32", len(batches), "bench", {})
    output = folder / "shards" / "0.h5"
    output.parent.mkdir(parents=True)

    def run() -> int:
        output.unlink(missing_ok=True)
        work = Work(batches, tokens, points, "fp32", loaded.device, 0, 1.0)
        runner = ResidentRunner(loaded, points, chunk, "fp32")
        with ShardWriter(output, spec) as writer:
            profile, watch = ShardProfile(loaded, output, ()), MemoryWatch(loaded.device)
            run_batches(runner, work, whole, writer, profile, watch)
            writer.finish()
        return output.stat().st_size

    return run


def hidden_states_and_save(
    model: Path, layers: list[int], documents: list[list[int]], folder: Path
) -> Round:
    """`output_hidden_states=True` on padded batches with their mask, the layers' rows by
    `torch.save`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batches = _peers_batches(documents)

    def run() -> int:
        _empty(folder)
        with torch.inference_mode():
            for number, (ids, mask) in enumerate(batches):
                states = causal(
                    input_ids=ids, attention_mask=mask, output_hidden_states=True
                ).hidden_states
                torch.save({k: states[k + 1].clone() for k in layers}, folder / f"{number}.pt")
        return _size(folder)

    return run


def transformer_lens_bridge(
    model: Path, layers: list[int], documents: list[list[int]], folder: Path
) -> Round:
    """`TransformerBridge.run_with_cache` with a names filter, the cache by `torch.save`."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    causal = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    bridge = TransformerBridge.boot_transformers(
        str(model), hf_model=causal, tokenizer=AutoTokenizer.from_pretrained(model), device="cpu"
    )
    batches = _peers_batches(documents)
    wanted = {f"blocks.{k}.hook_resid_post" for k in layers} | {
        f"blocks.{k}.hook_out" for k in layers
    }

    def run() -> int:
        _empty(folder)
        with torch.inference_mode():
            for number, (ids, mask) in enumerate(batches):
                _, cache = bridge.run_with_cache(
                    ids, attention_mask=mask, names_filter=lambda name: name in wanted
                )
                rows = {name: value.clone() for name, value in cache.items()}
                assert len({name.split(".")[1] for name in rows}) == len(layers)
                torch.save(rows, folder / f"{number}.pt")
        return _size(folder)

    return run


def nnsight(model: Path, layers: list[int], documents: list[list[int]], folder: Path) -> Round:
    """An nnsight trace that saves the layers' outputs, by `torch.save`."""
    import nnsight as peer
    import torch
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    traced, batches = peer.NNsight(causal), _peers_batches(documents)

    def run() -> int:
        _empty(folder)
        with torch.inference_mode():
            for number, (ids, mask) in enumerate(batches):
                with traced.trace(input_ids=ids, attention_mask=mask):
                    saved = peer.save([traced.model.layers[k].output for k in layers])
                values = [v[0] if isinstance(v, tuple) else v for v in saved]
                torch.save(
                    {k: v.clone() for k, v in zip(layers, values, strict=True)},
                    folder / f"{number}.pt",
                )
        return _size(folder)

    return run


def hooked_transformer(
    model: Path, layers: list[int], documents: list[list[int]], folder: Path
) -> Round:
    """`HookedTransformer.run_with_cache` up to the last layer, with a names filter, the cache by
    `torch.save`.
    """
    import torch
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # what from_pretrained_no_processing does, which takes no model by its folder
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = loading_from_pretrained.get_pretrained_model_config(
        str(model), device="cpu", dtype=torch.float32
    )
    weights = loading_from_pretrained.get_pretrained_state_dict(
        str(model), config, causal, dtype=torch.float32
    )
    hooked = HookedTransformer(config, AutoTokenizer.from_pretrained(model))
    hooked.load_and_process_state_dict(weights, *(False,) * 4)
    del causal, weights
    batches, names = _peers_batches(documents), [f"blocks.{k}.hook_resid_post" for k in layers]

    def run() -> int:
        _empty(folder)
        with torch.inference_mode():
            for number, (ids, mask) in enumerate(batches):
                _, cache = hooked.run_with_cache(
                    ids,
                    attention_mask=mask,
                    names_filter=names,
                    stop_at_layer=max(layers) + 1,
                    return_type=None,
                )
                torch.save({name: cache[name].clone() for name in names}, folder / f"{number}.pt")
        return _size(folder)

    return run


def sae_lens(model: Path, layers: list[int], documents: list[list[int]], folder: Path) -> Round:
    """SAELens' `CacheActivationsRunner`, a run for each layer: documents joined and cut into
    contexts of one length.
    """
    from datasets import Dataset
    from sae_lens.cache_activations_runner import CacheActivationsRunner
    from sae_lens.config import CacheActivationsRunnerConfig
    from transformers import AutoConfig

    if len(layers) > MOST_RUNS:
        raise ValueError(f"it takes one hook point a run: {len(layers)} runs")
    ids = [i for document in documents for i in document]
    context = min(CONTEXT, len(ids)) if len(documents) > 1 else len(ids)
    batch = min(PEERS_BATCH, len(ids) // context)
    if len(ids) % (context * batch):
        raise ValueError(
            f"{len(ids)} tokens are not whole batches of {batch} contexts of {context}"
        )
    contexts = Dataset.from_dict(
        {"input_ids": [ids[n : n + context] for n in range(0, len(ids), context)]}
    )
    width = AutoConfig.from_pretrained(model).hidden_size
    runners = [
        CacheActivationsRunner(
            CacheActivationsRunnerConfig(
                dataset_path="",
                model_name=str(model),
                model_class_name="AutoModelForCausalLM",
                hook_name=f"model.layers.{layer}",
                d_in=width,
                model_batch_size=batch,
                context_size=context,
                training_tokens=len(ids),
                buffer_size_gb=len(ids) * width * 4 / 1e9,
                new_cached_activations_path=str(folder / str(layer)),
                shuffle=False,
                streaming=False,
                device="cpu",
            ),
            override_dataset=contexts,
        )
        for layer in layers
    ]
    for runner in runners:  # one model for all of them
        runner.activations_store.model = runner.model = runners[0].model

    def run() -> int:
        _empty(folder)
        for runner in runners:
            runner.run()
        return _size(folder)

    return run


AS_A_JOB = "TheLoom to disk"  # what the pipeline's jobs do, in the environment that they get
CONTENDERS: dict[str, Maker] = {
    "bare causal-LM forward": bare,
    "TheLoom to memory": theloom_to_memory,
    AS_A_JOB: theloom_to_disk,
    "output_hidden_states + torch.save": hidden_states_and_save,
    "TransformerLens Bridge + torch.save": transformer_lens_bridge,
    "nnsight + torch.save": nnsight,
    "HookedTransformer + torch.save": hooked_transformer,
    "SAELens CacheActivationsRunner": sae_lens,
}
# they need a TransformerLens before its version 4, which no longer has HookedTransformer: another
# environment
OLDER = ("HookedTransformer + torch.save", "SAELens CacheActivationsRunner")


def load(folder: Path, layers: list[int], precision: str = "fp32") -> tuple[Any, Any]:
    """TheLoom's own loading: what the layers need; -1 is the last one."""
    from theloom.config.schema import Config, PrecisionMode
    from theloom.hooks.points import point
    from theloom.model import files, loading
    from theloom.model.files import ModelFiles

    config = Config()
    config.model.source, config.extraction.device = str(folder), "cpu"
    config.memory.precision_mode = PrecisionMode[precision]
    count = files.read_config(config.model).num_blocks
    width = files.read_config(config.model).hidden_size
    points = [point("hook_resid_post", k % count, count, [width]) for k in layers]
    return loading.load_model(config, ModelFiles(folder, str(folder), None), points), points


def _chunk(documents: list[list[int]]) -> int:
    """Documents in one pass: the plan streams nothing that takes no more memory so, and these do
    not.
    """
    return max(map(len, documents))


def _batches(documents: list[list[int]]) -> list[Any]:
    from theloom.corpus.batching import padded, plan_batches

    lengths = np.array([len(d) for d in documents])
    offset = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([np.array(d, "<i4") for d in documents])
    return [
        padded(batch, ids, offset)
        for batch in plan_batches(lengths, BATCH_TOKENS, _chunk(documents))
    ]


def _peers_batches(documents: list[list[int]]) -> list[tuple[Any, Any]]:
    """Documents in the order of the corpus, so many at a time, padded on the right, with their
    mask.
    """
    import torch

    batches = []
    for start in range(0, len(documents), PEERS_BATCH):
        group = documents[start : start + PEERS_BATCH]
        width = max(map(len, group))
        ids = torch.tensor([d + [0] * (width - len(d)) for d in group])
        mask = torch.tensor([[1] * len(d) + [0] * (width - len(d)) for d in group])
        batches.append((ids, mask))
    return batches


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
