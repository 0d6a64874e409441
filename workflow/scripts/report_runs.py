"""Draw all runs of a call side by side: error against FP32, memory, speed."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0]):
    from theloom.report.draw import draw_runs

    draw_runs(
        [Path(file).parent for file in snakemake.input.activations],
        Path(snakemake.output[0]).parent,
    )
