"""Answers through the stages, read back, and what hooks see while they are decoded."""

import h5py
import torch
from support import stages
from theloom.corpus import tokens
from theloom.planning import estimate


def answered(folder, source, corpus, more=""):
    """A run with its answers, and nothing extracted."""
    folder.mkdir(exist_ok=True)
    run = stages(folder, source, f"{corpus} answers.source=model {more}")
    estimate.run_estimate(run.config("estimate"), run.folder / "estimate.h5")
    tokens.tokenize(run.config("tokens"), run.folder / "tokens.h5")
    run.answer()
    return run


def answers_of(run):
    """By document id, the tokens of its answer, their log-probabilities, stop reason and seed."""
    found = {}
    with h5py.File(run.documents) as file:
        ids, generated = file["tokens/input_ids"][:], file["tokens/generated"][:].astype(bool)
        offset, part = file["documents/offset"][:], file["answers/offset"][:]
        for n, name in enumerate(file["documents/id"][:].tolist()):
            own = slice(offset[n], offset[n + 1])
            found[name.decode()] = (
                ids[own][generated[own]].tolist(),
                file["answers/log_probability"][part[n] : part[n + 1]],
                file["answers/stop_reason"][n].decode(),
                int(file["answers/seed"][n]),
            )
    return found


def decode_loop(plain, block, ids, answer):
    """What a hook on a block sees of each token of an answer while it is decoded with a KV cache:
    a token's state comes with the step that takes it as input, the last one's with one step more.
    """
    seen = []
    hook = block.register_forward_hook(
        lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1:])
    )
    with torch.no_grad():
        out = plain(torch.tensor([ids]), use_cache=True)
        seen.clear()
        name = "cache_params" if "cache_params" in out else "past_key_values"  # Mamba: its states
        for token in answer:
            out = plain(torch.tensor([[token]]), use_cache=True, **{name: out[name]})
    hook.remove()
    return torch.cat([s.reshape(1, -1) for s in seen])
