rule verify:
    input:
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
    container:
        CONTAINER
    threads: resource("threads")
    resources:
        mem_mb=escalating("mem_mb"),
        runtime=escalating("verify_runtime"),
        disk_mb=all_shards("disk_mb"),
        gpu=resource("gpu"),
        gpu_model=resource("gpu_model"),
        min_free_gpu_mb=resource("min_free_gpu_mb"),
        constraint=resource("constraint"),
    message:
        "{wildcards.run}: verify against plain transformers "
        "({threads} threads, {resources.mem_mb} MB, {resources.runtime} min)"
    script:
        "../scripts/verify.py"
