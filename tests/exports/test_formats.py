"""Exports: each read back as its reader does, every value the store's, layers as `transformers`
numbers them.
"""

import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import theloom
import torch
from own_readers import SAELENS, SKBIO, read_by
from support import stages
from theloom.cli import main
from theloom.errors import ConfigError, HookError
from theloom.exports import FORMATS, export, job, saelens
from theloom.exports.folder import RECORD
from theloom.exports.job import Job
from transformers import AutoModel

PRE, MIDDLE, LAST = (
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_post",
    "blocks.2.hook_resid_post",
)
OUT = "ln_final.hook_out"
WIDTH = 64  # of the tiny Llama
HOOKS = f"memory.activation_cache_filter=[{PRE},blocks.*.hook_resid_post,{OUT}]"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    """Sentences of uneven length, one of them a single token."""
    folder = tmp_path_factory.mktemp("run")
    lines = [
        {"id": f"p/{n}.a", "text": "word " * (1 + 7 * n % 23) + "end", "kind": n % 2}
        for n in range(12)
    ]
    lines.append({"id": "one", "text": "a", "kind": 0})
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    keys = "corpus=text corpus.column=text corpus.id_column=id corpus.columns=[kind]"
    return stages(folder, tiny_llama, f"{HOOKS} {keys} corpus.path={folder / 'texts.jsonl'}").all()


@pytest.fixture(scope="module")
def acts(run):
    return theloom.open(run.activations)


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("chats")
    (folder / "template.jinja").write_text(TEMPLATE)
    talk = [
        {"role": "user", "content": "What is a loom?"},
        {"role": "assistant", "content": "A machine that weaves."},
    ]
    lines = [{"messages": talk[: 1 + n % 2] + talk} for n in range(5)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    keys = f"corpus=text corpus.messages=messages corpus.path={folder / 'chats.jsonl'}"
    template = f"corpus.chat_template={folder / 'template.jinja'}"
    made = stages(folder / "run", tiny_llama, f"{HOOKS} {keys} {template}").all()
    return theloom.open(made.activations)


@pytest.fixture(scope="module")
def plain(tiny_llama):
    """The hidden states of a plain model, as its own `output_hidden_states` gives them."""
    model = AutoModel.from_pretrained(tiny_llama, dtype=torch.float32).eval()

    def states(ids):
        with torch.no_grad():
            return model(torch.tensor([ids]), output_hidden_states=True).hidden_states

    return states


def close(a, b):
    return float((a - b).abs().max() / b.abs().max()) <= 1e-5


@pytest.mark.parametrize("fit", ["pack", "cut"])
def test_saelens_has_contexts_of_one_length(acts, tmp_path, fit):
    import datasets

    done = export(acts, "saelens", tmp_path / "sae", context_size=5, fit=fit)
    found = datasets.load_from_disk(str(tmp_path / "sae")).with_format("torch")
    assert done.hooks == [PRE, MIDDLE, "blocks.1.hook_resid_post", LAST]
    assert found.features[LAST].shape == (5, WIDTH)  # what SAELens' reader checks
    if fit == "pack":
        rows = np.arange(len(acts) // 5 * 5)
    else:
        rows = np.concatenate(
            [np.arange(a, a + (b - a) // 5 * 5) for a, b in zip(*offsets(acts), strict=True)]
        )
    assert len(found) == len(rows) // 5
    for hook in done.hooks:
        assert torch.equal(found[hook][:].reshape(-1, WIDTH), acts[hook][rows])
    assert found["token_ids"][:].flatten().tolist() == acts.input_ids.numpy(rows).tolist()
    assert any(f"{len(acts) - len(rows):,} of {len(acts):,} rows" in s for s in done.left_out)


def test_the_reader_of_saelens_gives_each_context_in_order(acts, tmp_path):
    export(acts, "saelens", tmp_path / "sae", context_size=5, fit="pack")
    np.save(tmp_path / "rows.npy", acts[MIDDLE][: len(acts) // 5 * 5].numpy())
    read = read_by("sae_lens", SAELENS, tmp_path / "sae", MIDDLE, tmp_path / "rows.npy")
    assert read == f"{len(acts) // 5} contexts\n"


def test_the_reader_of_scikit_bio_gives_each_protein(proteins, tmp_path):
    acts, _ = proteins
    export(acts, "scikit-bio", tmp_path / "out", hooks=[LAST])
    rows = [acts.document(n)[LAST][1:-1].numpy() for n in acts.documents]
    np.save(tmp_path / "rows.npy", np.concatenate(rows))
    (file,) = (tmp_path / "out").glob("*.h5")
    assert read_by("skbio", SKBIO, file, tmp_path / "rows.npy") == "3 embeddings\n"


def offsets(acts):
    return acts.window_offset[:-1].tolist(), acts.window_offset[1:].tolist()


def test_uneven_documents_make_no_contexts_unless_something_says_how(acts, tmp_path):
    with pytest.raises(ConfigError, match="contexts of one length; give --context-size N"):
        export(acts, "saelens", tmp_path / "a")
    with pytest.raises(ConfigError, match="do not have 5 rows; --pack joins them"):
        export(acts, "saelens", tmp_path / "b", context_size=5)
    with pytest.raises(ConfigError, match="npy has no contexts"):
        export(acts, "npy", tmp_path / "c", context_size=5)
    with pytest.raises(ConfigError, match="no context of 9999 rows"):
        export(acts, "saelens", tmp_path / "d", context_size=9999, fit="pack")


def test_speculators_counts_layers_as_hidden_states_do(chats, plain, tmp_path):
    import datasets
    from safetensors import safe_open

    folder = tmp_path / "spec"
    export(chats, "speculators", folder, hooks=[PRE, MIDDLE, LAST])
    prepared = datasets.load_from_disk(str(folder))
    assert len(prepared) == len(chats.documents)
    counted = {}
    for number, row in enumerate(prepared):
        with safe_open(folder / f"hidden_states/hs_{number}.safetensors", "pt") as file:
            states, ids = file.get_tensor("hidden_states"), file.get_tensor("token_ids")
            layers = json.loads(file.metadata()["layer_ids"])
        assert layers == [0, 1, 3]
        assert ids.tolist() == row["input_ids"]
        assert row["seq_len"] == len(ids) == len(states) == len(row["loss_mask"])
        expected = plain(row["input_ids"])
        assert close(states[:, 0], expected[0][0])
        assert close(states[:, 1], expected[1][0])
        assert torch.equal(states[:, 2], chats.document(number)[LAST])  # before the final norm
        roles = chats.document(number).rows
        assistant = chats.rows["role"][roles] == "assistant"
        assert row["loss_mask"] == assistant.astype(int).tolist()
        assert 0 < sum(row["loss_mask"]) < len(ids)
        for token, counts in zip(ids.tolist(), row["loss_mask"], strict=True):
            if counts:
                counted[token] = counted.get(token, 0) + 1
    assert torch.load(folder / "token_freq.pt", weights_only=True) == counted


def test_speculators_needs_the_last_block_s_output(acts, tmp_path):
    with pytest.raises(ConfigError, match=r"end --hooks with blocks\.2\.hook_resid_post"):
        export(acts, "speculators", tmp_path / "a", hooks=[PRE, MIDDLE])
    with pytest.raises(ConfigError, match="is not of it"):
        export(acts, "speculators", tmp_path / "b", hooks=[PRE, OUT])
    with pytest.raises(ConfigError, match="rows of all tokens"):
        export(acts, "speculators", tmp_path / "c", hooks=[LAST], keep="last")


def test_specforge_has_the_state_after_the_final_norm(chats, plain, tmp_path):
    folder = tmp_path / "forge"
    export(chats, "specforge", folder, hooks=[PRE, MIDDLE, LAST, OUT])
    for number in range(len(chats.documents)):
        path = folder / f"rows_0-2000/data_{number}.ckpt"
        record = torch.load(path, weights_only=True)
        expected = plain(record["input_ids"].tolist())
        assert record["hidden_state"].shape == (1, len(record["input_ids"]), WIDTH)
        assert close(record["hidden_state"], expected[-1])
        assert record["aux_hidden_state"].shape[-1] == 3 * WIDTH
        assert close(record["aux_hidden_state"][..., WIDTH : 2 * WIDTH], expected[1])
        assert record["loss_mask"].sum() > 0
    assert json.loads((folder / "layers.json").read_text()) == {
        "aux_hidden_state_layers": [-1, 0, 2]
    }


def test_specforge_names_the_hook_point_that_is_missing(acts, tmp_path):
    with pytest.raises(ConfigError, match=r"add ln_final\.hook_out to --hooks"):
        export(acts, "specforge", tmp_path / "a", hooks=[PRE, MIDDLE, LAST])
    with pytest.raises(ConfigError, match="takes 3 points of the residual stream"):
        export(acts, "specforge", tmp_path / "b", hooks=[PRE, OUT])


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    """A tiny ESM-2 over FASTA: special tokens at both ends."""
    from transformers import EsmConfig, EsmModel, EsmTokenizer

    folder = tmp_path_factory.mktemp("esm")
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(letters))
    tokenizer = EsmTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=len(letters),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=len(letters) - 1,
    )
    EsmModel(config, add_pooling_layer=False).eval().save_pretrained(folder / "model")
    (folder / "p.fasta").write_text(">sp|P1.1 first\nMKTAYIAKQR\n>Q2 second\nMW\nLLV\n>R3\nM\n")
    keys = f"{HOOKS} corpus=text corpus.path={folder / 'p.fasta'}"
    made = stages(folder / "run", folder / "model", keys).all()
    return theloom.open(made.activations), folder / "model"


def test_esm_has_residues_without_special_tokens(proteins, tmp_path):
    acts, model = proteins
    export(acts, "esm", tmp_path / "esm", hooks=[PRE, MIDDLE, OUT])
    plain = AutoModel.from_pretrained(model, add_pooling_layer=False).eval()
    for number, name in enumerate(acts.documents):
        record = torch.load(tmp_path / f"esm/{name}.pt", weights_only=True)
        assert record["label"] == name
        with torch.no_grad():
            ids = torch.from_numpy(acts.document(number).input_ids.astype(np.int64))[None]
            expected = plain(ids, output_hidden_states=True).hidden_states
        for layer in (0, 1, 3):
            residues = expected[layer][0, 1:-1]
            assert record["representations"][layer].shape == residues.shape
            assert close(record["representations"][layer], residues)
            assert close(record["mean_representations"][layer], residues.mean(dim=0))
            assert close(record["bos_representations"][layer], expected[layer][0, 0])


def test_esm_s_last_layer_is_after_the_norm(proteins, tmp_path):
    with pytest.raises(ConfigError, match="layer 3 is after the final norm"):
        export(proteins[0], "esm", tmp_path / "a", hooks=[MIDDLE, LAST])


@pytest.mark.parametrize("to", ["bio-embeddings", "prott5", "scikit-bio"])
def test_embeddings_of_proteins_are_the_residues(proteins, tmp_path, to):
    acts, _ = proteins
    with pytest.raises(ConfigError, match="holds one hook point"):
        export(acts, to, tmp_path / "several")
    export(acts, to, tmp_path / "out", hooks=[LAST])
    expected = {n: acts.document(n)[LAST][1:-1].numpy() for n in acts.documents}
    (file,) = (tmp_path / "out").glob("*.h5")
    with h5py.File(file) as found:
        if to == "scikit-bio":
            assert found.attrs["format"] == "embedding"
            assert (found.attrs["dim"], found.attrs["dtype"]) == (32, "float32")
            ends = found["idptr"][:].tolist()
            parts = np.split(found["embedding"][:], ends[:-1])
            sequences = np.split(found["id"][:], ends[:-1])
            texts = [s.tobytes().decode("ascii") for s in sequences]
            assert texts == ["MKTAYIAKQR", "MWLLV", "M"]
            ids = json.loads((tmp_path / "out/ids.json").read_text())
            read = dict(zip(ids, parts, strict=True))
        elif to == "prott5":
            names = {n: n.replace("/", "_").replace(".", "_") for n in expected}
            read = {n: found[names[n]][:] for n in expected}
        else:
            read = {d.attrs["original_id"]: d[:] for d in found.values()}
    assert read.keys() == expected.keys()
    assert all(np.array_equal(read[n], expected[n]) for n in expected)


def test_ids_that_become_one_name_are_refused(run, acts, tmp_path):
    two = ["a/b", "a_b"]
    from theloom.exports.job import safe_names

    with pytest.raises(ConfigError, match="'a/b' and 'a_b' would both be named 'a_b'"):
        safe_names(two)
    assert safe_names(["p/0.a"], "/.") == ["p_0_a"]
    with pytest.raises(ConfigError, match="cannot name a file"):
        safe_names([".."])


def test_crosscoder_has_raw_shards_and_ranges(acts, tmp_path):
    export(acts, "crosscoder", tmp_path / "store", dtype="bf16")
    for hook, name in ((PRE, f"{PRE}_in"), (LAST, f"{LAST}_out")):
        folder = tmp_path / "store" / name
        config = json.loads((folder / "config.json").read_text())
        meta = json.loads((folder / "shard_0.meta").read_text())
        raw = np.memmap(folder / "shard_0.memmap", np.int16, "r", shape=tuple(meta["shape"]))
        read = torch.from_numpy(raw.copy()).view(torch.bfloat16)
        assert torch.equal(read, acts[hook][:].bfloat16())
        assert (config["total_size"], config["shard_count"]) == (len(acts), 1)
        assert config["d_model"] == WIDTH
        mean = torch.load(folder / "mean.pt", weights_only=True)
        assert torch.allclose(mean, acts[hook][:].mean(dim=0), atol=1e-6)
        assert int(torch.load(folder / "count.pt", weights_only=True)) == len(acts)
    ranges = torch.load(tmp_path / "store/sequence_ranges.pt", weights_only=True)
    assert ranges.tolist() == acts.window_offset.tolist()
    tokens = torch.load(tmp_path / "store/tokens.pt", weights_only=True)
    assert tokens.tolist() == acts.input_ids.numpy(...).tolist()


def test_plain_formats_hold_every_row_token_and_column(acts, tmp_path):
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    for to in ("npy", "safetensors", "parquet"):
        export(acts, to, tmp_path / to, hooks=[MIDDLE], keep="last | first")
    chosen = acts.select("last | first")
    rows, ids = chosen[MIDDLE][:], chosen.input_ids.numpy(...)
    assert np.array_equal(np.load(tmp_path / f"npy/{MIDDLE}.npy"), rows.numpy())
    assert np.array_equal(np.load(tmp_path / "npy/input_id.npy"), ids)
    documents = json.loads((tmp_path / "npy/documents.json").read_text())
    assert documents["id"] == acts.documents
    assert documents["kind"] == acts.columns["kind"].tolist()
    tensors = load_file(tmp_path / "safetensors/rows-00000-of-00001.safetensors")
    assert torch.equal(tensors[MIDDLE], rows)
    assert tensors["tokens.input_id"].tolist() == ids.tolist()
    table = pq.read_table(tmp_path / "parquet/rows-00000-of-00001.parquet").to_pydict()
    assert np.array_equal(np.array(table[MIDDLE], "f4"), rows.numpy())
    assert table["kind"] == chosen.rows["kind"].tolist()
    assert table["id"] == [acts.documents[n] for n in chosen.rows["document"]]


def test_a_stopped_export_goes_on_with_what_is_missing(chats, tmp_path, monkeypatch):
    folder, fill, calls = tmp_path / "spec", Job.fill, []
    made: dict[Path, int] = {}  # when each file was written

    def stopping(self, hook, start, out):
        calls.append(hook)
        if len(calls) >= 6 and not made:
            raise KeyboardInterrupt
        fill(self, hook, start, out)

    monkeypatch.setattr(Job, "fill", stopping)
    monkeypatch.setattr(job, "_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        export(chats, "speculators", folder, hooks=[MIDDLE, LAST])
    made |= {f: f.stat().st_mtime_ns for f in (folder / "hidden_states").glob("*.safetensors")}
    assert len(made) == 2
    assert json.loads((folder / RECORD).read_text())["finished"] is False
    with pytest.raises(ConfigError, match="another export, which differs in hooks"):
        export(chats, "speculators", folder, hooks=[LAST])
    done = export(chats, "speculators", folder, hooks=[MIDDLE, LAST])
    assert {f: f.stat().st_mtime_ns for f in made} == made
    whole = export(chats, "speculators", tmp_path / "whole", hooks=[MIDDLE, LAST])
    assert done.left_out == whole.left_out
    for file in sorted((tmp_path / "whole").rglob("*.safetensors")):
        assert file.read_bytes() == (folder / file.relative_to(tmp_path / "whole")).read_bytes()
    assert not list(folder.rglob("*.partial"))
    calls.clear()
    export(chats, "speculators", folder, hooks=[MIDDLE, LAST])
    assert calls == []  # it is finished


@pytest.mark.parametrize("to", ["saelens", "crosscoder", "npy", "safetensors", "parquet"])
def test_an_export_killed_three_times_ends_with_the_same_files(acts, tmp_path, to):
    options = {"hooks": [MIDDLE] if to == "crosscoder" else [MIDDLE, LAST]}
    options |= {"context_size": 5, "fit": "pack"} if to == "saelens" else {}
    fill = Job.fill

    def killed(moment: int) -> None:
        calls = itertools.count()

        def dying(self, hook, start, out):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            fill(self, hook, start, out)

        Job.fill = dying
        export(acts, to, tmp_path / "killed", **options)

    codes = []
    for moment in (0, 1, 1):
        process = multiprocessing.get_context("fork").Process(target=killed, args=(moment,))
        process.start()
        process.join(900)
        codes.append(process.exitcode)
    assert codes[0] == -signal.SIGKILL
    export(acts, to, tmp_path / "killed", **options)
    export(acts, to, tmp_path / "whole", **options)
    found, whole = (
        {f.relative_to(root): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}
        for root in (tmp_path / "killed", tmp_path / "whole")
    )
    assert found.keys() == whole.keys()
    differ = [str(name) for name in whole if found[name] != whole[name]]
    assert not differ


@pytest.fixture(scope="module")
def pooled(run, tiny_llama, tmp_path_factory):
    path = run.folder / "texts.jsonl"
    keys = f"corpus=text corpus.column=text corpus.id_column=id corpus.path={path} rows.pool=mean"
    folder = tmp_path_factory.mktemp("pooled")
    return theloom.open(stages(folder, tiny_llama, f"{HOOKS} {keys}").all().activations)


@pytest.mark.parametrize("to", FORMATS)
def test_pooled_rows_are_exported_or_refused_in_one_line(pooled, tmp_path, to):
    if to in ("speculators", "specforge", "esm", "scikit-bio"):
        with pytest.raises(ConfigError, match=r"pooled|rows of all tokens"):
            export(pooled, to, tmp_path / "out", hooks=[LAST])
        return
    export(pooled, to, tmp_path / "out", hooks=[LAST])
    if to == "prott5":
        with h5py.File(tmp_path / "out/embeddings.h5") as file:
            assert np.array_equal(file["p_3_a"][:], pooled[LAST][3].numpy())


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_rows_that_are_read_in_pieces_are_converted_as_pytorch_does(
    acts, tmp_path, monkeypatch, dtype
):
    from datasets import load_from_disk
    from safetensors.torch import load_file

    monkeypatch.setattr(job, "_READ_BYTES", 5 * 4 * WIDTH)
    monkeypatch.setattr(job, "_ELEMENTS", 2 * WIDTH)
    monkeypatch.setattr(saelens, "_BATCH_BYTES", 1)
    monkeypatch.setattr(saelens, "_LEAST_BYTES", 1)
    to = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    export(acts, "speculators", tmp_path / "spec", hooks=[MIDDLE, LAST], dtype=dtype)
    for number in range(len(acts.documents)):
        found = load_file(tmp_path / f"spec/hidden_states/hs_{number}.safetensors")
        rows = [acts.document(number)[hook].to(to) for hook in (MIDDLE, LAST)]
        assert torch.equal(found["hidden_states"], torch.stack(rows, dim=1))
    options = {"hooks": [MIDDLE, LAST], "context_size": 3, "fit": "cut", "dtype": dtype}
    export(acts, "saelens", tmp_path / "sae", **options)
    read = load_from_disk(str(tmp_path / "sae")).with_format("torch")
    starts = [n for a, b in zip(*offsets(acts), strict=True) for n in range(a, b - 2, 3)]
    rows = (np.array(starts)[:, None] + np.arange(3)).reshape(-1)
    assert len(list((tmp_path / "sae").glob("*.arrow"))) > 1
    for hook in (MIDDLE, LAST):
        expected = acts[hook][rows].to(to)
        assert torch.equal(read[hook][:].reshape(-1, WIDTH).to(to), expected)


def test_the_command_exports_and_says_what_is_left_out(run, acts, tmp_path, capsys):
    words = ["export", str(run.activations), str(tmp_path / "out"), "--to", "saelens"]
    assert main.main([*words, "--context-size", "5", "--pack", "--hooks", LAST]) == 0
    said = capsys.readouterr().out
    assert f"{len(acts):,} rows of 1 hook points (saelens)" in said
    assert "left out: where documents end" in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert main.main([*words[:2], str(tmp_path / "full"), "--to", "npy"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "full/mine.txt").read_text() == "mine"


def test_a_hook_point_that_is_not_there_is_named(acts, tmp_path):
    with pytest.raises(HookError, match=r"blocks\.9"):
        export(acts, "npy", tmp_path / "a", hooks=["blocks.9.hook_resid_post"])
    with pytest.raises(ConfigError, match="there is no format 'zarr'; choose from saelens"):
        export(acts, "zarr", tmp_path / "b")
    assert not (tmp_path / "a").exists()


def test_scales_are_those_of_the_trainers_over_all_rows(acts):
    rows = acts[LAST][:].double()
    saelens, other = (acts.scale(LAST, by) for by in ("saelens", "dictionary_learning"))
    assert saelens == pytest.approx(WIDTH**0.5 / float(rows.norm(dim=1).mean()), rel=1e-6)
    assert other == pytest.approx(float(rows.square().sum(dim=1).mean()) ** -0.5, rel=1e-6)
    with pytest.raises(ConfigError, match="give 'saelens'"):
        acts.scale(LAST, "sum")
