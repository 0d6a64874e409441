"""What theloom.open returns, in the forms of other libraries: against h5py and the dataset's own
rows.
"""

import h5py
import numpy as np
import pytest
import theloom
import torch
from support import stages
from theloom.errors import ConfigError


@pytest.fixture(scope="module")
def acts(tmp_path_factory, tiny_llama):
    hooks = "memory.activation_cache_filter=[blocks.*.hook_resid_post,blocks.1.attn.hook_pattern]"
    requested = f"{hooks} corpus.max_tokens=300 corpus.context_length=120 store.dtype=bf16"
    return theloom.open(
        stages(tmp_path_factory.mktemp("run"), tiny_llama, requested).all().activations
    )


def test_the_repr_names_rows_model_precision_hook_points_and_the_next_step(acts):
    for text in (repr(acts), acts._repr_html_()):
        for words in (
            "300 tokens of",
            "in fp32",
            "bf16",
            "blocks.1.attn.hook_pattern",
            "4 × 120",
            "to_dataframe()",
        ):
            assert words in " ".join(text.split())
    assert max(map(len, repr(acts).splitlines()[1:])) <= 80  # the first names the file


def test_the_table_of_documents_is_that_of_the_file(acts):
    frame = acts.to_dataframe()
    with h5py.File(acts.path) as file:
        assert frame["id"].tolist() == [i.decode() for i in file["documents/id"][:]]
        assert frame["tokens"].tolist() == np.diff(file["documents/offset"][:]).tolist()
    assert frame["windows"].tolist() == [-(-n // 120) for n in frame["tokens"]]


def test_texts_in_the_table_of_tokens_add_up_to_the_document(acts):
    frame = acts.to_dataframe("tokens")
    assert len(frame) == 300
    assert frame["input_id"].tolist() == acts.input_ids.numpy(...).tolist()
    assert "".join(frame["token"][frame["document"] == 0]).startswith('The "assert" statement')
    assert acts.to_dataframe("tokens", slice(10, 13)).index.tolist() == [10, 11, 12]
    with pytest.raises(ConfigError, match="'documents' or 'tokens'"):
        acts.to_dataframe("rows")


def test_a_cache_has_the_shapes_of_transformer_lens(acts):
    number = next(n for n, windows in enumerate(acts.to_dataframe()["windows"]) if windows == 1)
    document, cache = acts.document(number), acts.cache(number)
    assert list(cache) == acts.hooks
    assert torch.equal(cache["resid_post", 2], document["blocks.2.hook_resid_post"][None])
    pattern = cache["pattern", 1]
    assert pattern.shape == (1, 4, len(document), len(document))
    torch.testing.assert_close(
        pattern.float().sum(dim=-1), torch.ones(1, 4, len(document)), atol=2e-2, rtol=0
    )
    assert not pattern.triu(1).any()
    assert "blocks.9.hook_resid_post" not in cache
    with pytest.raises(KeyError, match="no such hook point"):
        cache["mlp_out", 0]


def test_a_document_of_several_windows_has_no_cache(acts):
    number = int(acts.to_dataframe()["windows"].argmax())
    with pytest.raises(ConfigError, match="was cut into"):
        acts.cache(number)


def test_datasets_have_the_rows_as_float32(acts):
    hook = acts.hooks[0]
    dataset = acts.to_datasets([hook, "blocks.1.attn.hook_pattern"]).with_format("torch")
    assert len(dataset) == 300
    assert torch.equal(dataset[17][hook], acts[hook][17].float())
    assert dataset[17]["blocks.1.attn.hook_pattern"].shape == (4, 120)
    assert int(dataset[17]["input_id"]) == int(acts.input_ids.numpy(17))


def test_xarray_has_tokens_as_coordinates(acts):
    hook = acts.hooks[0]
    found = acts.to_xarray([hook], slice(40, 60))
    assert found[hook].dims == ("row", "axis1_64")
    assert np.array_equal(found[hook].values, acts[hook][40:60].float().numpy())
    assert found["row"].values.tolist() == list(range(40, 60))
    assert np.array_equal(found["position"].values, acts.position.numpy(slice(40, 60)))
