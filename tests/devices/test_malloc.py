"""What jobs ask of glibc's malloc."""

import os
import platform
import subprocess
import sys

import pytest
from theloom.devices import host

# Tensors of the shapes that a small model's pass makes, batches of ever fewer tokens, and small
# ones that stay between them; at most 47 MB at once.
FORWARD = """
import torch, psutil
rss = lambda: psutil.Process().memory_info().rss
torch.empty(1).sum()
before, most, live = rss(), 0, []
for tokens in [2048, 1900, 1777, 1600, 1411, 1300, 1111, 1023] * 2:
    x = torch.ones(tokens, 576)
    for block in range(6):
        q, k, v = (x * n for n in (1, 2, 3))
        attended = q + k + v
        del q, k, v
        small = [torch.ones(n) for n in range(8, 200, 8)]
        gate, up = torch.ones(tokens, 1536), torch.ones(tokens, 1536)
        product = gate * up
        most = max(most, rss())
        del gate, up
        x = x + product[:, :576] + attended
        live.append(small)
        most = max(most, rss())
print(most - before)
"""


def environment(**own: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | own


def printed(script: str, env: dict[str, str]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_process_that_frees_tensors_takes_their_places_again():
    plain, tuned = environment(), environment()
    host.reuse_freed_blocks(tuned)
    grown = printed(FORWARD, tuned)
    assert grown < 200e6
    # without it most processes grow by 660 MB; in some, by chance, tensors find their places too
    assert any(grown < 1.2 * printed(FORWARD, plain) for _ in range(3))


def test_what_the_user_has_set_stays():
    env = environment(GLIBC_TUNABLES="glibc.malloc.trim_threshold=4096:glibc.malloc.arena_max=1")
    host.reuse_freed_blocks(env)
    host.reuse_freed_blocks(env)
    settings = dict(s.split("=") for s in env["GLIBC_TUNABLES"].split(":"))
    assert len(settings) == env["GLIBC_TUNABLES"].count("=") == 5
    assert settings["glibc.malloc.trim_threshold"] == "4096"
    assert settings["glibc.malloc.tcache_count"] == "0"


FREED = """
import psutil, torch
from theloom.devices import host
rss = lambda: psutil.Process().memory_info().rss
blocks = [torch.ones(1 << 18) for _ in range(200)]
stays = torch.ones(1000)
del blocks
before = rss()
host.release_free_heap()
print(before - rss())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_free_memory_is_given_back_when_it_is_requested():
    tuned = environment()
    host.reuse_freed_blocks(tuned)
    assert printed(FREED, tuned) > 150e6  # of 210 MB
