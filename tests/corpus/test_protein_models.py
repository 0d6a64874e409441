"""Models of proteins and DNA from FASTA, through the stages: residues, and one mean a sequence."""

from itertools import pairwise, product

import h5py
import numpy as np
import pytest
import theloom
import torch
from support import stages
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    EsmcConfig,
    EsmcForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    EsmTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
PROTEINS = ">one\nMKTAYIAKQRQISFVKSHFSRQ\nLEERLG\n>two\nM\n>three\nKVFGRCELAA\n"
DNA = ">chr1\nACGTACGTTTAGGA\n>one base\nA\n"
HOOK = "blocks.1.hook_resid_post"


def esm_letters(folder, tokens=tuple(LETTERS)):
    special = ["<cls>", "<pad>", "<eos>", "<unk>"]
    (folder / "vocab.txt").write_text("\n".join([*special, *tokens, "<mask>"]))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def kmers(folder):
    """As the Nucleotide Transformer's: words of 6 bases (here 3), and single ones for the rest."""
    esm_letters(folder, tuple("".join(k) for k in product("ACGT", repeat=3)) + tuple("ACGTN"))


def spaced(folder):
    """As ProtBert's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS[:21]]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)


def spaced_with_end(folder):
    """As ProtT5's: letters behind spaces, and </s> at the end."""
    words = ["<pad>", "</s>", "<unk>", *(f"▁{letter}" for letter in LETTERS[:21])]
    raw = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    made.save_pretrained(folder)


def pairs(folder):
    """As ProtGPT2's: byte pairs, so that a token may be several residues."""
    letters = {letter: n for n, letter in enumerate(["<|endoftext|>", *LETTERS])}
    merges = [("K", "V"), ("A", "A"), ("E", "E")]
    vocabulary = letters | {a + b: len(letters) + n for n, (a, b) in enumerate(merges)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    made.save_pretrained(folder)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 80,
}
ESM = {**SIZES, "pad_token_id": 1, "mask_token_id": 31, "position_embedding_type": "rotary"}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 32}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 128}
KINDS = {
    "ESM-2": (lambda: EsmForMaskedLM(EsmConfig(**ESM)), esm_letters, PROTEINS),
    "ESM C": (lambda: EsmcForMaskedLM(EsmcConfig(**SIZES)), esm_letters, PROTEINS),
    "ProtBert": (lambda: BertForMaskedLM(BertConfig(**SIZES)), spaced, PROTEINS),
    "ProtT5": (lambda: T5EncoderModel(T5Config(**T5)), spaced_with_end, PROTEINS),
    "ProtGPT2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), pairs, PROTEINS),
    "Nucleotide Transformer": (
        lambda: EsmForMaskedLM(
            EsmConfig(**ESM | {"position_embedding_type": "absolute", "token_dropout": False})
        ),
        kmers,
        DNA,
    ),
}


def made(kind, folder):
    """The kind's model and tokenizer, saved; and its run over FASTA, without special tokens."""
    build, tokenizer, fasta = KINDS[kind]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder / "model")
    tokenizer(folder / "model")
    (folder / "x.fasta").write_text(fasta)
    return model


def overrides(folder, rows):
    return (
        f"corpus=text corpus.path={folder}/x.fasta rows.keep=~special {rows} "
        f"memory.activation_cache_filter=[{HOOK},ln_final.hook_out]"
    )


def expected(model, folder, run):
    """The last hidden states of plain transformers of each sequence alone, and which tokens of it
    are special.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    special = set(tokenizer.all_special_ids)
    with h5py.File(run.activations) as file:
        ids, offsets = file["tokens/input_ids"][:], file["documents/offset"][:]
    for begin, end in pairwise(offsets.tolist()):
        row = ids[begin:end].astype("i8")
        with torch.no_grad():
            states = model(torch.from_numpy(row)[None], output_hidden_states=True).hidden_states
        yield states[-1][0], np.array([i not in special for i in row.tolist()])


@pytest.mark.parametrize("kind", KINDS)
def test_residues_from_fasta_are_those_of_plain_transformers(tmp_path, kind):
    model = made(kind, tmp_path)
    run = stages(tmp_path / "run", tmp_path / "model", overrides(tmp_path, "")).all()
    run.verify()
    acts, at = theloom.open(run.activations), 0
    for states, residue in expected(model, tmp_path, run):
        count = int(residue.sum())
        assert count
        rows = acts["ln_final.hook_out"][at : at + count]
        torch.testing.assert_close(rows, states[torch.from_numpy(residue)], rtol=1e-4, atol=1e-5)
        at += count
    assert at == len(acts)


@pytest.mark.parametrize("kind", ["ESM-2"])
def test_one_mean_a_sequence_is_that_of_its_residues(tmp_path, kind):
    model = made(kind, tmp_path)
    run = stages(tmp_path / "run", tmp_path / "model", overrides(tmp_path, "rows.pool=mean")).all()
    acts = theloom.open(run.activations)
    means = [s[torch.from_numpy(r)].mean(0) for s, r in expected(model, tmp_path, run)]
    torch.testing.assert_close(
        acts["ln_final.hook_out"][:], torch.stack(means), rtol=1e-4, atol=1e-5
    )
