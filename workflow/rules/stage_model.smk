# Runs on the machine of Snakemake, which has a network and the user's login. Without a shared file
# system other machines would not see what it fetches there: then it is a job like the others.
rule stage_model:
    input:
        # The estimate rejects what does not fit the disk before anything is fetched. A model whose
        # dimensions are in no profile must be fetched first to be estimated.
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
        "{wildcards.run}: fetch the model's files"
    script:
        "../scripts/stage_model.py"
