rule extract_shard:
    input:
        config=frozen("extract"),
        # Another plan changes how a shard is computed, and no row of it.
        estimate=ancient("results/{run}/estimate.h5"),
        model="results/{run}/model.h5",
        tokens=documents,
    output:
        shard="results/{run}/shards/{shard}-of-{shards}.h5",
    log:
        "results/{run}/logs/extract_shard/{shard}-of-{shards}.log",
    benchmark:
        "results/{run}/benchmarks/extract_shard/{shard}-of-{shards}.tsv"
    wildcard_constraints:
        run=shard_groups.others(SHARD_GROUPS),
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    threads: resource("threads")
    resources:
        mem_mb=escalating("mem_mb"),
        runtime=escalating("runtime"),
        disk_mb=resource("disk_mb"),
        gpu=resource("gpu"),
        gpu_model=resource("gpu_model"),
        min_free_gpu_mb=resource("min_free_gpu_mb"),
        constraint=resource("constraint"),
        oom_level=lambda wildcards, attempt: attempt - 1,
    message:
        "{wildcards.run}: extract shard {wildcards.shard} of {wildcards.shards} "
        "({threads} threads, {resources.mem_mb} MB, {resources.runtime} min)"
    script:
        "../scripts/extract_shard.py"
