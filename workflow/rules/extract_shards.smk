# Runs of which one job extracts several shards. Snakemake's rules have a fixed list of outputs, so each group of
# shards is a rule, of the runs that are cut so.
for group in SHARD_GROUPS:

    rule:
        name:
            group.rule
        input:
            config=frozen("extract"),
            estimate=ancient("results/{run}/estimate.h5"),
            model="results/{run}/model.h5",
            tokens=documents,
        output:
            shard=[f"results/{{run}}/shards/{name}.h5" for name in group.names],
        log:
            f"results/{{run}}/logs/extract_shard/{group.label}.log",
        benchmark:
            f"results/{{run}}/benchmarks/extract_shard/{group.label}.tsv"
        wildcard_constraints:
            run=group.runs,
        conda:
            "../../envs/theloom.yaml"
        container:
            CONTAINER
        threads: resource("threads")
        resources:
            mem_mb=escalating("mem_mb"),
            runtime=escalating("runtime"),
            disk_mb=of_group("disk_mb", len(group.names)),
            gpu=resource("gpu"),
            gpu_model=resource("gpu_model"),
            min_free_gpu_mb=resource("min_free_gpu_mb"),
            constraint=resource("constraint"),
            oom_level=lambda wildcards, attempt: attempt - 1,
        message:
            f"{{wildcards.run}}: extract shards {group.label} ({len(group.names)} shards, {{threads}} threads, "
            "{resources.mem_mb} MB, {resources.runtime} min)"
        script:
            "../scripts/extract_shard.py"
