"""Model folders damaged at random: a line of words, or the rows of plain transformers.

Damage is in headers and JSON: tensors have no checksums. LONG_TESTS=1 takes 60 folders, the short
version 12.
"""

import os
import random

import pytest
from model_folders import errors_against_plain, llama, run
from theloom.errors import TheLoomError
from transformers import AutoModelForCausalLM

SEEDS = range(60 if os.environ.get("LONG_TESTS") else 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in one file, and another in shards."""
    single = llama(tmp_path_factory.mktemp("fuzz") / "single")
    sharded = llama(tmp_path_factory.mktemp("fuzz") / "sharded")
    model = AutoModelForCausalLM.from_pretrained(sharded)
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="100KB")
    return [single, sharded]


def header(content):
    """Bytes of a file that are no tensor's."""
    return 8 + int.from_bytes(content[:8], "little")


def remove(file, chance):
    file.unlink()


def cut(file, chance):
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def flip(file, chance):
    content = bytearray(file.read_bytes())
    end = header(content) if file.suffix == ".safetensors" else len(content)
    content[chance.randrange(end)] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def write_over(file, chance):
    content = bytearray(file.read_bytes())
    end = header(content) if file.suffix == ".safetensors" else len(content)
    content[chance.randrange(end)] = chance.choice(b'0123456789"{}[],:aFIx ')
    file.write_bytes(content)


def swap(file, chance):
    other = chance.choice([f for f in file.parent.iterdir() if f != file])
    mine, others = file.read_bytes(), other.read_bytes()
    file.write_bytes(others)
    other.write_bytes(mine)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_folder_is_refused_or_gives_its_own_rows(tmp_path, folders, seed):
    chance = random.Random(seed)
    source = tmp_path / "model"
    whole = folders[seed % 2]
    source.mkdir()
    for file in whole.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    damage = chance.choice([remove, cut, flip, flip, write_over, write_over, swap])
    damage(chance.choice(sorted(source.iterdir())), chance)
    line = ""
    try:
        made = run(tmp_path, source).all()
    except TheLoomError as error:
        line = str(error)
    assert "\n" not in line
    assert line or errors_against_plain(made, source) < 1e-5
