# Only runs of many shards, or with verify.jobs, have the jobs of parts: nothing else asks for their files.
rule check_rows:
    input:
        activations="results/{run}/activations.h5",
    output:
        counts=temp("results/{run}/verification/rows/{part}-of-{parts}.h5"),
    log:
        "results/{run}/logs/check_rows/{part}-of-{parts}.log",
    benchmark:
        "results/{run}/benchmarks/check_rows/{part}-of-{parts}.tsv"
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    threads: resource("threads")
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=escalating("verify_runtime"),
        disk_mb=all_shards("disk_mb"),
    message:
        "{wildcards.run}: check rows, part {wildcards.part} of {wildcards.parts} "
        "({threads} threads, {resources.mem_mb} MB, {resources.runtime} min)"
    script:
        "../scripts/check_rows.py"


rule recompute_documents:
    input:
        config=frozen("verify"),
        model="results/{run}/model.h5",
        activations="results/{run}/activations.h5",
    output:
        errors=temp("results/{run}/verification/documents/{part}-of-{parts}.h5"),
    log:
        "results/{run}/logs/recompute_documents/{part}-of-{parts}.log",
    benchmark:
        "results/{run}/benchmarks/recompute_documents/{part}-of-{parts}.tsv"
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
        "{wildcards.run}: recompute documents, part {wildcards.part} of {wildcards.parts} "
        "({threads} threads, {resources.mem_mb} MB, {resources.runtime} min)"
    script:
        "../scripts/recompute_documents.py"


rule verify:
    input:
        config=frozen("verify"),
        model="results/{run}/model.h5",
        activations="results/{run}/activations.h5",
        rows=checked_rows,
        documents=recomputed_documents,
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
        mem_mb=lambda wildcards, attempt: (
            escalating("mem_mb")(wildcards, attempt)
            if verifies_alone(wildcards)
            else 2000 * attempt
        ),
        runtime=escalating("verify_runtime"),
        disk_mb=all_shards("disk_mb"),
        gpu=resource("gpu", verifies_alone),
        gpu_model=resource("gpu_model", verifies_alone),
        min_free_gpu_mb=resource("min_free_gpu_mb", verifies_alone),
        constraint=resource("constraint", verifies_alone),
    message:
        "{wildcards.run}: verify against plain transformers "
        "({threads} threads, {resources.mem_mb} MB, {resources.runtime} min)"
    script:
        "../scripts/verify.py"
