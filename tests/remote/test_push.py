"""Hidden states are pushed to a real S3 server whose connections fail, and read back by ranges."""

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import h5py
import numpy as np
import pytest
import theloom
import torch
from remote_support import CUT, DROP, FORBID, HOLD, SLOW_DOWN, Bucket, s3_server
from shards import spec
from support import stages
from theloom.cli.main import main
from theloom.errors import StoreError
from theloom.hooks.points import residual_points
from theloom.remote import faults
from theloom.remote.push import push
from theloom.store import file_format
from theloom.store.writer import ShardWriter

MANIFEST = "theloom-manifest.json"


@pytest.fixture(scope="module")
def server():
    with s3_server() as found:
        yield found


@pytest.fixture
def proxy(server):
    proxy = server[1]
    proxy.faults.clear()
    proxy.requests.clear()
    proxy.sent = proxy.received = 0
    yield proxy
    proxy.fault = lambda number: None


@pytest.fixture
def bucket(server, request):
    return Bucket(server[0], f"bucket-{abs(hash(request.node.name)):x}")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    """A run of three shards, by the stages of the pipeline."""
    overrides = "extraction.shards=3 corpus.max_tokens=600"
    return stages(tmp_path_factory.mktemp("run"), tiny_llama, overrides).all()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A shard of 24 MiB, for parts and ranges."""
    path = tmp_path_factory.mktemp("large") / "activations.h5"
    one = dataclasses.replace(spec(lengths=[3000, 1, 71]), points=residual_points(1, 1024)[:2])
    one.attributes.update(batch_tokens=3000, chunk_size=3000, run_fingerprint="run")
    with ShardWriter(path, one) as writer:
        for window, length in enumerate([3000, 1, 71]):
            for point in one.points:
                writer.write(window, point.name, 0, torch.randn(length, 1024))
            writer.batch_done([3000, 3001, 3072][window], last=window == 2)
        writer.finish()
    return path


def failing(number: int) -> str | None:
    """Every third request fails, in turn in each way."""
    return (DROP, SLOW_DOWN, CUT)[number // 3 % 3] if number % 3 == 0 else None


def bits(rows: torch.Tensor) -> np.ndarray:
    return rows.contiguous().view(torch.uint8).numpy()


def same_rows(remote, local) -> None:
    assert len(remote) == len(local)
    assert remote.hooks == local.hooks
    shuffled = np.random.default_rng(0).permutation(len(local))
    for hook in local.hooks:
        assert np.array_equal(bits(remote[hook][:]), bits(local[hook][:]))
        assert np.array_equal(bits(remote[hook][shuffled]), bits(local[hook][shuffled]))
        assert np.array_equal(bits(remote[hook][-1]), bits(local[hook][-1]))
        assert len(remote[hook][5:5]) == 0


def error_of(capsys, *words: str) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    assert main(words) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_a_run_is_pushed_and_read_through_failing_connections(run, bucket, proxy, caplog, capsys):
    proxy.fault = failing
    assert main(["push", str(run.activations), f"{bucket.url}/run"]) == 0
    assert {*proxy.faults} == {DROP, SLOW_DOWN, CUT}
    for file in (run.activations, *run.shards):
        assert bucket.get(f"run/{file.relative_to(run.folder)}") == file.read_bytes()
    proxy.faults.clear()
    remote, local = theloom.open(f"{bucket.url}/run"), theloom.open(run.activations)
    same_rows(remote, local)
    assert {*proxy.faults} == {DROP, SLOW_DOWN, CUT}
    shown = caplog.text + "".join(capsys.readouterr())
    assert "testing-secret" not in shown


def test_values_are_those_that_h5py_reads_from_the_shards(run, bucket, proxy):
    push(run.activations, f"{bucket.url}/run")
    remote = theloom.open(f"{bucket.url}/run/activations.h5")
    for hook in remote.hooks:
        stored = []
        for path in run.shards:
            with h5py.File(path) as file:
                stored.append(file[f"hooks/{hook}/activations"].astype("f4")[:])
        assert np.array_equal(remote[hook][:].float().numpy(), np.concatenate(stored))
    with h5py.File(run.shards[0]) as file:
        assert np.array_equal(remote.input_ids.numpy(slice(0, 9)), file["tokens/input_ids"][:9])


def test_batches_documents_and_tables_are_the_local_ones(run, bucket, proxy):
    push(run.activations, f"{bucket.url}/run")
    remote, local = theloom.open(f"{bucket.url}/run"), theloom.open(run.activations)
    hooks = [local.hooks[0], "input_ids", "row"]
    for options in ({}, {"shuffle": True, "block_rows": 7, "buffer_rows": 100}):
        pairs = zip(
            remote.batches(hooks, 50, **options), local.batches(hooks, 50, **options), strict=True
        )
        for ours, theirs in pairs:
            assert all(np.array_equal(bits(ours[h]), bits(theirs[h])) for h in hooks)
    dataset = remote.dataset(hooks[0], 64)
    list(dataset)  # a process that is forked after this has connections of its own
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1)
    assert torch.equal(torch.cat(list(loader)), local[hooks[0]][:])
    assert remote.documents == local.documents
    document = remote.document(0)
    assert torch.equal(document[hooks[0]], local.document(0)[hooks[0]])
    assert remote.statistics[hooks[0]].mean_of_all == local.statistics[hooks[0]].mean_of_all
    assert torch.equal(
        remote.select("last | first")[hooks[0]][:], local.select("last | first")[hooks[0]][:]
    )


def test_packed_rows_are_read_by_their_chunks(tmp_path, bucket, proxy):
    path = tmp_path / "packed.h5"
    one = dataclasses.replace(
        spec(lengths=[500, 1], compression="zstd"), points=residual_points(1, 256)[:2]
    )
    one.attributes.update(batch_tokens=500, chunk_size=500, run_fingerprint="run")
    with ShardWriter(path, one) as writer:
        for window, (length, end) in enumerate([(500, 500), (1, 501)]):
            for point in one.points:
                writer.write(window, point.name, 0, torch.randn(length, 256))
            writer.batch_done(end, last=window == 1)
        writer.finish()
    push(path, f"{bucket.url}/run")
    same_rows(theloom.open(f"{bucket.url}/run/packed.h5"), theloom.open(path))


def test_a_folder_is_pushed_without_what_is_unfinished(run, bucket, proxy, capsys):
    (run.folder / "shards/left.h5.partial").write_bytes(b"1")
    assert main(["push", str(run.folder), f"{bucket.url}/all", "--licence", "corpus: CC0"]) == 0
    assert "theloom.open(" in capsys.readouterr().out
    keys = bucket.keys()
    assert "all/model.h5" in keys
    assert not any(".partial" in key for key in keys)
    card = bucket.get("all/README.md").decode()
    assert card.startswith("---\n")
    for text in ("corpus: CC0", "blocks.0.hook_resid_pre", "theloom.open(", "tiny-llama"):
        assert text in card
    assert str(run.folder) not in card
    manifest = json.loads(bucket.get(f"all/{MANIFEST}"))
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((run.folder / name).read_bytes()).hexdigest()
    same_rows(theloom.open(f"{bucket.url}/all"), theloom.open(run.activations))


def test_only_what_is_missing_or_changed_is_uploaded_again(run, bucket, proxy, tmp_path):
    url, copy = f"{bucket.url}/run", tmp_path / "run"
    shutil.copytree(run.folder, copy)
    first = push(copy, url)
    assert first.uploaded_files == first.files
    assert push(copy, url).uploaded_files == 0
    (copy / "extra.txt").write_text("one")
    bucket.delete("run/shards/00001-of-00003.h5")
    again = push(copy, url)
    assert again.uploaded_files == 2
    (copy / "extra.txt").write_text("two")
    assert push(copy, url).uploaded_files == 1
    assert bucket.get("run/extra.txt") == b"two"


PUSH = "import sys; from theloom.remote.push import push; print(push(*sys.argv[1:3], (), 5 << 20))"


def test_a_push_that_is_killed_goes_on_with_the_parts_that_are_missing(large, bucket, proxy):
    url, total = f"{bucket.url}/run", large.stat().st_size
    command = [sys.executable, "-c", PUSH, str(large), url]
    for kill in range(3):
        passed = itertools.count()

        def hold(number: int, passed: Iterator[int] = passed) -> str | None:
            """Let one part pass; the others wait."""
            return HOLD if b"partNumber" in proxy.requests[-1] and next(passed) else None

        proxy.fault = hold
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while bucket.parts() <= kill:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert bucket.keys() == []  # S3 has no object before all of its parts are there
    proxy.fault = failing
    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sent = int(re.search(r"uploaded_bytes=(\d+)", done).group(1))
    assert 0 < sent <= 2 * (5 << 20) < total  # of five parts; each push that was killed left one
    assert bucket.get("run/activations.h5") == large.read_bytes()
    proxy.fault = lambda number: None
    same_rows(theloom.open(url), theloom.open(large))


def test_large_ranges_are_read_in_few_requests(large, bucket, proxy):
    push(large, f"{bucket.url}/run")
    remote = theloom.open(f"{bucket.url}/run")
    hook = remote.hooks[0]
    proxy.requests.clear()
    proxy.received = 0
    rows = remote[hook][1:]
    assert torch.equal(rows, theloom.open(large)[hook][1:])
    assert len(proxy.requests) <= 8
    assert proxy.received < 1.1 * rows.nbytes
    proxy.received = 0
    remote[hook][7]  # in a block that is there
    assert proxy.received == 0


def read_all(url: str) -> None:
    remote = theloom.open(url)
    for hook in remote.hooks:
        remote[hook][:]


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("where", ["rows", "metadata", "record", "manifest"])
def test_a_changed_remote_byte_is_an_error_of_one_line(run, bucket, proxy, where):
    push(run.activations, f"{bucket.url}/run")
    shard = next(path for path in run.shards if len(theloom.open(path)))
    with h5py.File(shard) as file:
        hook = theloom.open(shard).hooks[0]
        at = file_format.byte_offset(file[file_format.hook_path(hook)]) + 77
    of_record = bucket.get(f"run/{MANIFEST}").index(b"record_sha256")
    key, at = {
        "rows": (f"run/shards/{shard.name}", at),
        "metadata": ("run/activations.h5", 50),
        "record": (f"run/hashes/shards/{shard.name}", -5),
        "manifest": (f"run/{MANIFEST}", of_record + 20),
    }[where]
    bucket.put(key, flipped(bucket.get(key), at))
    local = theloom.open(run.activations)
    with pytest.raises(StoreError, match=r"push the file again|is damaged") as caught:
        read_all(f"{bucket.url}/run")
    assert "\n" not in str(caught.value)
    assert bucket.name in str(caught.value)
    bucket.put(key, flipped(bucket.get(key), at))
    same_rows(theloom.open(f"{bucket.url}/run"), local)


def test_missing_and_shortened_objects_are_named(run, bucket, proxy):
    push(run.activations, f"{bucket.url}/run")
    key = f"run/shards/{max(run.shards, key=lambda path: path.stat().st_size).name}"
    data = bucket.get(key)
    bucket.put(key, data[:-300_000])
    remote = theloom.open(f"{bucket.url}/run")
    with pytest.raises(StoreError, match=re.escape(key)):
        remote[remote.hooks[-1]][:]
    bucket.delete(key)
    with pytest.raises(StoreError, match="is missing; push the file again"):
        theloom.open(f"{bucket.url}/run")[remote.hooks[-1]][:]


def test_what_is_verified_and_inspected_may_be_remote(run, bucket, proxy, capsys):
    url = f"{bucket.url}/run"
    push(run.activations, url)
    assert main(["verify", url]) == 0
    assert "all" in capsys.readouterr().out
    assert main(["inspect", url, "--json"]) == 0
    schema = json.loads(capsys.readouterr().out)["schema"]
    assert main(["inspect", str(run.activations), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == schema
    assert "download" in error_of(capsys, "verify", url, "--recompute", "1")


def test_what_cannot_be_pushed_or_read_is_told_in_one_line(
    run, bucket, proxy, capsys, monkeypatch, tmp_path
):
    file = str(run.activations)
    monkeypatch.setattr(faults, "TRIES", 2)
    monkeypatch.setattr(faults, "FIRST_WAIT", 0.01)
    assert "no such bucket" in error_of(capsys, "push", file, "s3://nobody-has-this/run")
    assert "theloom push" in error_of(capsys, "inspect", f"{bucket.url}/nothing")
    assert "no file system" in error_of(capsys, "push", file, "foo://bucket/run")
    assert "is no URL" in error_of(capsys, "push", file, str(tmp_path))
    told = error_of(capsys, "push", file, "s3://me:secret-word@bucket/run")
    assert "secret-word" not in told
    assert "environment" in told
    proxy.fault = lambda number: FORBID
    assert "may not be" in error_of(capsys, "push", file, f"{bucket.url}/run")
    proxy.fault = lambda number: DROP
    assert "check the network" in error_of(capsys, "push", file, f"{bucket.url}/run")
    proxy.fault = lambda number: None
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "theloom[gcs]" in error_of(capsys, "push", file, "gs://bucket/run")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no activations.h5" in error_of(capsys, "push", str(empty), f"{bucket.url}/run")


def test_any_file_system_of_fsspec_will_do(run, tmp_path):
    url = f"file://{tmp_path}/pushed"
    push(run.activations, url)
    assert push(run.activations, url).uploaded_files == 0
    same_rows(theloom.open(url), theloom.open(run.activations))
    pair = theloom.open_pair(url, run.activations, names=["a", "b"])
    hook = pair.first.hooks[0]
    assert torch.equal(pair[hook][:][:, 0], pair[hook][:][:, 1])


def test_names_that_leave_the_folder_are_refused(run, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copytree(run.folder, tmp_path / "run")
    link = tmp_path / "run/link.txt"
    (folder / "secret.txt").write_text("secret")
    link.symlink_to(folder / "secret.txt")
    with pytest.raises(StoreError, match="outside of the folder"):
        push(tmp_path / "run", f"file://{tmp_path}/pushed")
    push(run.activations, f"file://{tmp_path}/pushed")
    manifest = tmp_path / "pushed" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"shards/00000', '"../shards/00000'))
    with pytest.raises(StoreError, match="is damaged"):
        theloom.open(f"file://{tmp_path}/pushed")
