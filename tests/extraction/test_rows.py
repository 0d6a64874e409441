"""Rows that the public functions keep or pool are those of plain transformers."""

import itertools

import pytest
import torch
from support import build_tiny
from theloom.errors import ConfigError, HookError, InputError
from theloom.extraction import (
    collect_streaming_results,
    extract_hidden_states,
    extract_inference_optimized,
    extract_streaming,
    extract_with_checkpointing,
)
from transformers import AutoModelForCausalLM, BertConfig, BertModel

HOOK = "blocks.1.hook_resid_post"
LENGTHS = (5, 23, 14)
EXPRESSIONS = {
    "all": lambda n: range(n),
    "last": lambda n: [n - 1],
    "~last(2) & ~first": lambda n: range(1, n - 2),
    "[2:-1] & ~[:6]": lambda n: range(6, n - 1),  # nothing of the first row
}
POOLS = {
    "mean": lambda states: states.mean(0),
    "sum": lambda states: states.sum(0),
    "max": lambda states: states.amax(0),
    "first": lambda states: states[0],
    "last": lambda states: states[-1],
}
CALLS = {
    "one pass": extract_hidden_states,
    "chunks": lambda *args, **more: collect_streaming_results(
        extract_streaming(*args, chunk_size=4, **more)
    ),
    "checkpointing": extract_with_checkpointing,
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = build_tiny("llama", tmp_path_factory.mktemp("llama"))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return BertModel(BertConfig(**sizes, intermediate_size=96, vocab_size=128)).eval()


def padded(side):
    seeded = torch.Generator().manual_seed(2)
    ids, mask = torch.zeros(3, 23, dtype=torch.long), torch.zeros(3, 23, dtype=torch.long)
    for i, n in enumerate(LENGTHS):
        place = slice(-n, None) if side == "left" else slice(0, n)
        ids[i, place], mask[i, place] = torch.randint(3, 128, (n,), generator=seeded), 1
    return {"input_ids": ids, "attention_mask": mask}


def plain(model, batch):
    """The states of each row of tokens alone, in FP64."""
    with torch.no_grad():
        return [
            model(ids[mask.bool()][None], output_hidden_states=True).hidden_states[2][0].double()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]


def close(found, expected, share):
    assert found.shape == expected.shape
    assert float((found.detach() - expected).abs().max() / expected.abs().max()) <= share


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_and_pooled_rows_of_a_decoder(decoder, call, side):
    batch = padded(side)
    states = plain(decoder, batch)
    for keep, of in EXPRESSIONS.items():
        chosen = [[*of(n)] for n in LENGTHS]
        found = CALLS[call](decoder, batch, hooks=[HOOK], rows=keep)
        close(found[HOOK], torch.cat([s[c] for s, c in zip(states, chosen, strict=True)]), 1e-5)
        pad = [23 - n if side == "left" else 0 for n in LENGTHS]
        expected = [[row, pad[row] + token] for row, c in enumerate(chosen) for token in c]
        assert torch.stack([found.rows.batch, found.rows.position], 1).tolist() == expected
        for pool, of_states in POOLS.items():
            pooled = CALLS[call](decoder, batch, hooks=[HOOK], rows={"keep": keep, "pool": pool})
            kept = [s[c] for s, c in zip(states, chosen, strict=True) if c]
            close(pooled[HOOK], torch.stack([of_states(s) for s in kept]), 1e-6)
            assert pooled.rows.batch.tolist() == [row for row, c in enumerate(chosen) if c]


def test_rows_of_an_encoder_and_of_another_precision(encoder, decoder):
    for side, keep in itertools.product(("left", "right"), ("last", "~[:1] & ~last")):
        batch = padded(side)
        expected = plain(encoder, batch)
        found = extract_hidden_states(encoder, batch, hooks=[HOOK], rows=keep)
        part = slice(-1, None) if keep == "last" else slice(1, -1)
        close(found[HOOK], torch.cat([s[part] for s in expected]), 1e-5)
        mean = extract_hidden_states(encoder, batch, [HOOK], rows={"keep": keep, "pool": "mean"})
        close(mean[HOOK], torch.stack([s[part].mean(0) for s in expected]), 1e-6)
    whole = extract_inference_optimized(decoder, batch, precision="bf16", hooks=[HOOK])[HOOK]
    kept = extract_inference_optimized(
        decoder, batch, precision="bf16", hooks=[HOOK], rows="last(2)"
    )
    assert torch.equal(kept[HOOK], torch.cat([whole[i, n - 2 : n] for i, n in enumerate(LENGTHS)]))
    pooled = extract_inference_optimized(
        decoder, batch, precision="bf16", hooks=[HOOK], rows={"pool": "mean"}
    )[HOOK]
    assert pooled.dtype == torch.float32
    close(pooled, torch.stack([whole[i, :n].double().mean(0) for i, n in enumerate(LENGTHS)]), 1e-6)


def test_gradients_flow_through_pooled_rows(decoder):
    batch, keep = padded("right"), slice(1, -1)
    weight = next(decoder.parameters())
    found = extract_with_checkpointing(
        decoder, batch, hooks=[HOOK], rows={"keep": "[1:-1]", "pool": "mean"}
    )[HOOK]
    (mine,) = torch.autograd.grad(found.square().sum(), weight)
    with torch.enable_grad():
        rows = [
            decoder(ids[:n][None], output_hidden_states=True).hidden_states[2][0, keep].mean(0)
            for ids, n in zip(batch["input_ids"], LENGTHS, strict=True)
        ]
        (expected,) = torch.autograd.grad(torch.stack(rows).square().sum(), weight)
    close(mine, expected, 1e-5)


def test_a_chunk_has_the_rows_of_its_own_tokens(decoder):
    batch = padded("left")
    chunks = list(extract_streaming(decoder, batch, 8, [HOOK], rows="last | [7:9]"))
    assert [chunk.rows.batch.tolist() for chunk in chunks] == [[0, 1, 2], [1, 2, 2], [1]]
    early = collect_streaming_results(chunks[:2])
    assert early.rows.number.tolist() == [0, 1, 2, 4, 5, 6]
    whole = extract_hidden_states(decoder, batch, [HOOK], rows="last | [7:9]")
    close(early[HOOK], whole[HOOK][early.rows.number].double(), 1e-5)


def test_special_and_assistant_of_a_tokenizers_output(decoder):
    batch = padded("right") | {
        "special_tokens_mask": torch.ones(3, 23, dtype=torch.long).index_fill(
            1, torch.arange(1, 23), 0
        ),
        "assistant_masks": (torch.arange(23) % 3 == 1).long().expand(3, 23),
    }
    found = extract_hidden_states(decoder, batch, [HOOK], rows="~special & assistant & ~[:3]")
    assert found.rows.position.tolist() == [4, *range(4, 23, 3), *range(4, 14, 3)]
    batch["assistant_masks"] = torch.zeros(3, 23, dtype=torch.long)
    with pytest.raises(InputError, match="marks no token; the chat template has no"):
        extract_hidden_states(decoder, batch, [HOOK], rows="assistant|first")


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        ("assistant", ConfigError, "rows: assistant is not known of token ids; here are all"),
        ("match('a')", ConfigError, "rows: match is not known of token ids"),
        ("last &", ConfigError, "rows: the expression ends"),
        ("[40:]", InputError, "keeps no token of the 3 rows"),
        ({"keep": "last", "by": "message"}, InputError, "rows: found .* give an expression"),
        ({"pool": "median"}, InputError, "pool is 'median'; give one of none, mean"),
        (7, InputError, "rows: found 7; give an expression"),
    ],
)
def test_rows_that_cannot_be_are_refused_before_a_pass(decoder, rows, error, says):
    with pytest.raises(error, match=says):
        extract_hidden_states(decoder, padded("right"), [HOOK], rows=rows)


def test_rows_over_keys_are_refused(decoder):
    with pytest.raises(HookError, match=r"rows: blocks.0.attn.hook_pattern is over the keys"):
        extract_hidden_states(decoder, [1, 2], ["blocks.0.attn.hook_pattern"], rows="last")


def test_progress_is_shown_where_it_is_requested(decoder, capsys):
    extract_hidden_states(decoder, padded("right"), [HOOK])
    assert capsys.readouterr().err == ""
    extract_hidden_states(decoder, padded("right"), [HOOK], progress=True)
    assert "1/1" in capsys.readouterr().err
    for _ in extract_streaming(decoder, padded("right"), 8, [HOOK], progress=True):
        pass
    assert "23/23" in capsys.readouterr().err
