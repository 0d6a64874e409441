"""Write the config of one stage, as it was composed when the pipeline started, to a JSON file."""

from pathlib import Path

from theloom.config.frozen import freeze
from theloom.pipeline.job import job

with job(snakemake.log[0]):
    freeze(snakemake.params.config, Path(snakemake.output.config))
