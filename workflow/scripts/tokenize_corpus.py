"""Turn the documents of the corpus into token ids, or gather what the jobs of parts made of them;
and plan the shards.
"""

from pathlib import Path

from theloom.pipeline.job import job

with job(snakemake.log[0], snakemake.threads):
    from theloom.config.frozen import load_frozen

    config, output = load_frozen(snakemake.input.config), Path(snakemake.output.tokens)
    if snakemake.input.parts:
        from theloom.corpus.in_parts.gather import gather

        gather(config, [Path(part) for part in snakemake.input.parts], output)
    else:
        from theloom.corpus.tokens import tokenize

        tokenize(config, output)
