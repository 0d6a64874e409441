"""A whole run in a process that may take little memory: python limited_run.py FOLDER MODEL LIMIT
[CGROUP].

LIMIT is bytes: with CGROUP (a folder of the kernel's) of all memory that the process has, without
it of address space beyond what the loaded interpreter has. Prints one JSON object.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

if len(sys.argv) > 4:
    (Path(sys.argv[4]) / "cgroup.procs").write_text(str(os.getpid()))
os.environ["HF_HUB_OFFLINE"] = "1"

import h5py
import psutil
import torch
from support import stages
from theloom.devices import host
from theloom.errors import MemoryPlanError
from theloom.model import loading
from theloom.pipeline import load_model

torch.set_num_threads(2)


def main(folder: Path, source: str, limit: int) -> None:
    requested = (
        "memory.activation_cache_filter=[blocks.-1.hook_resid_post] extraction.shards=1 "
        f"{os.environ['REQUESTED']}"
    )
    torch.nn.functional.linear(torch.zeros(64, 64), torch.zeros(64, 64))
    if len(sys.argv) <= 4:
        whole = psutil.Process().memory_info().vms + limit
        resource.setrlimit(resource.RLIMIT_AS, (whole, whole))
    loading.load_model = None  # nothing may load the whole model
    begun = time.time()
    run = stages(folder / "auto", source, requested)
    run.prepare()
    resident = stages(folder / "resident", source, f"{requested} extraction.execution=resident")
    said = ""
    try:
        files = (run.folder / "estimate.h5", run.folder / "tokens.h5", resident.folder / "model.h5")
        load_model.record(resident.config("model"), *files)
    except MemoryPlanError as error:
        said = str(error)
    run.extract()
    run.merge()
    run.verify()
    seconds = time.time() - begun
    with h5py.File(run.folder / "verification.h5") as file:
        errors = (file["recomputed/max_abs_error"][:] / file["recomputed/max_abs"][:]).max()
    found = {
        "refused": said,
        "seconds": seconds,
        "peak": host.peak_resident(),
        "error": float(errors),
    }
    print(json.dumps(found))


main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
