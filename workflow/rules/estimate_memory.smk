rule estimate_memory:
    input:
        config=frozen("estimate"),
    output:
        estimate="results/{run}/estimate.h5",
    log:
        "results/{run}/logs/estimate_memory.log",
    benchmark:
        "results/{run}/benchmarks/estimate_memory.tsv"
    conda:
        "../../envs/theloom.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    message:
        "{wildcards.run}: estimate memory and disk"
    script:
        "../scripts/estimate_memory.py"
