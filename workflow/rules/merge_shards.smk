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
    resources:
        mem_mb=2000,
        runtime=60,
    message:
        "{wildcards.run}: merge the shards"
    script:
        "../scripts/merge_shards.py"
