"""Write the front page of a run: its figures, what ran, and where it lies."""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0]):
    from theloom.config.frozen import load_frozen
    from theloom.report.page import write_page

    write_page(
        load_frozen(snakemake.input.config),
        Path(snakemake.output.page).parent,
        Path(snakemake.scriptdir).parent / "report",
    )
