# Only runs with store.remote have these jobs: nothing else asks for their files. They run on the machine of
# Snakemake, which has a network and the user's logins.
rule push_shard:
    input:
        config=frozen("push"),
        shard="results/{run}/shards/{shard}-of-{shards}.h5",
    output:
        record="results/{run}/pushed/{shard}-of-{shards}.json",
    log:
        "results/{run}/logs/push_shard/{shard}-of-{shards}.log",
    benchmark:
        "results/{run}/benchmarks/push_shard/{shard}-of-{shards}.tsv"
    localrule: workflow.storage_settings.default_storage_provider is None
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    resources:
        mem_mb=2000,
        runtime=240,
    message:
        "{wildcards.run}: push shard {wildcards.shard} of {wildcards.shards}"
    script:
        "../scripts/push_shard.py"


rule push_run:
    input:
        config=frozen("push"),
        activations="results/{run}/activations.h5",
        verification="results/{run}/verification.h5",
        shards=shards,
        pushed=pushed_shards,
    output:
        record="results/{run}/pushed.json",
    log:
        "results/{run}/logs/push_run.log",
    benchmark:
        "results/{run}/benchmarks/push_run.tsv"
    localrule: workflow.storage_settings.default_storage_provider is None
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    resources:
        mem_mb=2000,
        runtime=240,
    message:
        "{wildcards.run}: push the run"
    script:
        "../scripts/push_run.py"


# Only runs with store.keep_local=false: nothing comes after it that reads rows.
rule remove_shards:
    input:
        config=frozen("remove"),
        pushed="results/{run}/pushed.json",
        shards=pushed_shards,
        report=report_with_label,
    output:
        record="results/{run}/removed.json",
    log:
        "results/{run}/logs/remove_shards.log",
    benchmark:
        "results/{run}/benchmarks/remove_shards.tsv"
    localrule: workflow.storage_settings.default_storage_provider is None
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    resources:
        mem_mb=2000,
        runtime=240,
    message:
        "{wildcards.run}: read the pushed shards back, and remove the local ones"
    script:
        "../scripts/remove_shards.py"
