rule extract_shard:
    input:
        resources=ancient(frozen("resources")),
        config=frozen("extract"),
        estimate="results/{run}/estimate.h5",
        model="results/{run}/model.h5",
        tokens="results/{run}/tokens.h5",
    output:
        shard="results/{run}/shards/{shard}-of-{shards}.h5",
    log:
        "results/{run}/logs/extract_shard/{shard}-of-{shards}.log",
    benchmark:
        "results/{run}/benchmarks/extract_shard/{shard}-of-{shards}.tsv"
    conda:
        "../../envs/theloom.yaml"
    threads: resource("threads")
    resources:
        mem_mb=memory,
        runtime=resource("runtime"),
        gpu=resource("gpu"),
    message:
        "{wildcards.run}: extract shard {wildcards.shard} of {wildcards.shards}"
    script:
        "../scripts/extract_shard.py"
