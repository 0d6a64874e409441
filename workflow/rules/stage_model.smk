# On the machine where Snakemake runs, which has a network and the user's login. Without a shared file system nobody
# would see there what it fetches: then it is a job like the others.
rule stage_model:
    input:
        # What does not fit the disk is refused before anything is fetched; a model whose numbers are in no profile
        # must be here to be estimated.
        estimate=lambda wildcards: (
            [] if unknown_model(wildcards) else ancient(f"results/{wildcards.run}/estimate.h5")
        ),
        config=frozen("source"),
    output:
        source="results/{run}/source.json",
    log:
        "results/{run}/logs/stage_model.log",
    benchmark:
        "results/{run}/benchmarks/stage_model.tsv"
    localrule: workflow.storage_settings.default_storage_provider is None
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    resources:
        mem_mb=2000,
        runtime=240,
    message:
        "{wildcards.run}: have the model's files here"
    script:
        "../scripts/stage_model.py"
