rule verify:
    input:
        resources=ancient(frozen("resources")),
        config=frozen("verify"),
        model="results/{run}/model.h5",
        activations="results/{run}/activations.h5",
    output:
        verification="results/{run}/verification.h5",
    log:
        "results/{run}/logs/verify.log",
    benchmark:
        "results/{run}/benchmarks/verify.tsv"
    conda:
        "../../envs/theloom.yaml"
    threads: resource("threads")
    resources:
        mem_mb=memory,
        runtime=resource("runtime"),
        gpu=resource("gpu"),
    message:
        "{wildcards.run}: verify against plain transformers"
    script:
        "../scripts/verify.py"
