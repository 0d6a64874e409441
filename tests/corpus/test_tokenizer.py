"""Token ids of the tokenizer's class and of `tokenizer.json`, and texts that begin with a BOS."""

import h5py
import pytest
import theloom
from model_folders import describe, llama, run
from theloom.corpus import tokens
from theloom.corpus.tokenizer import PROBE
from theloom.corpus.tokens_file import reading
from theloom.dataset import token_text
from theloom.errors import ConfigError, CorpusError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = ["no digits here", "in 2023 and 12345", "12345 again"]


def digits_one_by_one(folder):
    """A tokenizer whose file splits digits, and whose class would not."""
    pair = [pre_tokenizers.Digits(individual_digits=True)]
    pair.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["2023 2024 1999 12345 " * 99], trainer)
    trained.pre_tokenizer = pre_tokenizers.Sequence(pair)
    trained.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>").save_pretrained(folder)
    describe(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")


@pytest.fixture
def source(tmp_path):
    folder = llama(tmp_path / "model")
    digits_one_by_one(folder)
    return folder


def tokenized(folder, source, overrides="", texts=None):
    made = run(folder, source, overrides, texts)
    tokens.tokenize(made.config("tokens"), made.folder / "tokens.h5")
    with h5py.File(made.folder / "tokens.h5") as file:
        return file["tokens/input_ids"][:].tolist(), reading.attributes(made.folder / "tokens.h5")


def test_other_ids_by_the_file_are_a_warning_with_an_example(tmp_path, source, caplog):
    ids, recorded = tokenized(tmp_path, source, texts=TEXTS)
    of_class = AutoTokenizer.from_pretrained(source)
    of_file = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert ids == [i for text in TEXTS for i in of_class(text)["input_ids"]]
    by_class, by_file = of_class(" 2023")["input_ids"], of_file.encode(" 2023").ids
    assert by_class != by_file
    example = f"' 2023': {by_class} by the class, {by_file} by the file"
    assert recorded["tokenizer_difference"] == example
    warnings = [r.getMessage() for r in caplog.records if "tokenizer.json" in r.getMessage()]
    assert len(warnings) == 1
    assert example in warnings[0]
    assert "corpus.tokenizer_from" in warnings[0]


def test_the_file_s_ids_can_be_taken_through_all_stages(tmp_path, source):
    made = run(tmp_path, source, "corpus.tokenizer_from=file", TEXTS).all()
    made.verify()
    acts = theloom.open(made.activations)
    of_file = Tokenizer.from_file(str(source / "tokenizer.json"))
    for number, text in enumerate(TEXTS):
        assert acts.document(number).input_ids.tolist() == of_file.encode(text).ids
        assert "".join(token_text.texts(acts, acts.document(number).input_ids)) == text


def test_a_difference_on_the_probe_alone_is_found(tmp_path, source):
    _, recorded = tokenized(tmp_path, source, texts=["nothing to see"])
    assert "by the file" in recorded["tokenizer_difference"]
    assert any(c.isdigit() for c in PROBE)


@pytest.mark.parametrize("special", ["true", "false"])
def test_the_same_ids_are_no_warning(tmp_path, special, caplog):
    source = llama(tmp_path / "model")
    overrides = f"corpus.add_special_tokens={special}"
    ids, recorded = tokenized(tmp_path, source, overrides, TEXTS)
    raw = Tokenizer.from_file(str(source / "tokenizer.json"))
    encoded = raw.encode_batch(TEXTS, add_special_tokens=special == "true")
    assert ids == [i for e in encoded for i in e.ids]
    assert recorded["tokenizer_difference"] == ""
    assert "tokenizer.json" not in caplog.text


def test_truncation_in_the_file_cuts_nothing(tmp_path):
    source = llama(tmp_path / "model")
    raw = Tokenizer.from_file(str(source / "tokenizer.json"))
    raw.enable_truncation(3)
    raw.enable_padding(length=5)
    raw.save(str(source / "tokenizer.json"))
    for choice in ("class", "file"):
        overrides = f"corpus.tokenizer_from={choice}"
        ids, recorded = tokenized(tmp_path / choice, source, overrides, TEXTS)
        assert len(ids) == sum(len(text) + 1 for text in TEXTS)
        assert recorded["tokenizer_difference"] == ""


def test_the_file_s_ids_need_a_file(tmp_path):
    from transformers import ByT5Tokenizer

    source = llama(tmp_path / "model")
    (source / "tokenizer.json").unlink()
    ByT5Tokenizer().save_pretrained(source)
    ids, recorded = tokenized(tmp_path / "class", source, texts=["ab"])
    assert ids == ByT5Tokenizer()("ab")["input_ids"]
    assert recorded["tokenizer_difference"] == ""
    with pytest.raises(ConfigError, match=r"corpus\.tokenizer_from=file: .* no tokenizer\.json"):
        tokenized(tmp_path / "file", source, "corpus.tokenizer_from=file")


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizer", "BertTokenizer"])
def test_a_class_without_its_vocabulary_is_refused(tmp_path, name):
    source = llama(tmp_path / "model")
    (source / "tokenizer.json").unlink()
    describe(source, "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(CorpusError, match=r"no usable tokenizer: neither tokenizer\.json nor"):
        tokenized(tmp_path, source)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_one_line(tmp_path, name):
    from theloom.errors import TheLoomError

    source = llama(tmp_path / "model")
    content = (source / name).read_bytes()
    (source / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(TheLoomError) as caught:
        tokenized(tmp_path, source)
    assert "\n" not in str(caught.value)


def test_a_second_bos_is_a_warning_with_the_count(tmp_path, caplog):
    source = llama(tmp_path / "model")
    texts = ["<s>one", "two", "<s> three", "four <s>"]
    ids, recorded = tokenized(tmp_path / "a", source, texts=texts)
    assert ids[:2] == [1, 1]
    assert recorded["double_bos_documents"] == 2
    (warning,) = [r.getMessage() for r in caplog.records if "begin with <s>" in r.getMessage()]
    assert warning.startswith("2 documents")
    caplog.clear()
    ids, recorded = tokenized(tmp_path / "b", source, "corpus.add_special_tokens=false", texts)
    assert ids[0] == 1
    assert ids[1] != 1
    assert recorded["double_bos_documents"] == 0
    assert "begin with" not in caplog.text
