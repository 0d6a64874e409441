rule estimate_memory:
    input:
        config=frozen("estimate"),
        source=lambda wildcards: (
            f"results/{wildcards.run}/source.json" if unknown_model(wildcards) else []
        ),
    output:
        estimate="results/{run}/estimate.h5",
    log:
        "results/{run}/logs/estimate_memory.log",
    benchmark:
        "results/{run}/benchmarks/estimate_memory.tsv"
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
        disk_mb=1000,
    message:
        "{wildcards.run}: estimate memory and disk"
    script:
        "../scripts/estimate_memory.py"
