# Only runs with answers.source have these jobs: nothing else asks for their files.
rule sample_answers:
    input:
        config=frozen("sample"),
        # Another plan changes how many answers are sampled side by side, and none of them.
        estimate=ancient("results/{run}/estimate.h5"),
        prompts="results/{run}/tokens.h5",
    output:
        answers="results/{run}/answers/{shard}-of-{shards}.h5",
    log:
        "results/{run}/logs/sample_answers/{shard}-of-{shards}.log",
    benchmark:
        "results/{run}/benchmarks/sample_answers/{shard}-of-{shards}.tsv"
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    threads: resource("threads")
    resources:
        mem_mb=escalating("mem_mb"),
        runtime=escalating("sample_runtime"),
        disk_mb=resource("sample_disk_mb"),
        gpu=resource("gpu"),
        gpu_model=resource("gpu_model"),
        min_free_gpu_mb=resource("min_free_gpu_mb"),
        constraint=resource("constraint"),
        oom_level=lambda wildcards, attempt: attempt - 1,
    message:
        "{wildcards.run}: sample the answers of shard {wildcards.shard} of {wildcards.shards} "
        "({threads} threads, {resources.mem_mb} MB, {resources.runtime} min)"
    script:
        "../scripts/sample_answers.py"


rule gather_answers:
    input:
        config=frozen("answers"),
        source="results/{run}/source.json",
        prompts="results/{run}/tokens.h5",
        answers=sampled_shards,
    output:
        answers="results/{run}/answers.h5",
    log:
        "results/{run}/logs/gather_answers.log",
    benchmark:
        "results/{run}/benchmarks/gather_answers.tsv"
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
        disk_mb=all_shards("sample_disk_mb"),
    message:
        "{wildcards.run}: put the answers behind their prompts"
    script:
        "../scripts/gather_answers.py"
