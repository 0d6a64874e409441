rule merge_shards:
    input:
        config=frozen("merge"),
        shards=shards,
    output:
        activations="results/{run}/activations.h5",
    log:
        "results/{run}/logs/merge_shards.log",
    benchmark:
        "results/{run}/benchmarks/merge_shards.tsv"
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
        disk_mb=all_shards("disk_mb"),
    message:
        "{wildcards.run}: merge the shards"
    script:
        "../scripts/merge_shards.py"
