rule load_model:
    input:
        config=frozen("model"),
        # A new plan or corpus is no reason to load the model again. The tokens are an input so that
        # a mistake in the corpus ends the run before any weight is loaded.
        estimate=ancient("results/{run}/estimate.h5"),
        tokens=lambda wildcards: ancient(documents(wildcards)),
    output:
        model="results/{run}/model.h5",
    log:
        "results/{run}/logs/load_model.log",
    benchmark:
        "results/{run}/benchmarks/load_model.tsv"
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    threads: resource("threads")
    resources:
        mem_mb=escalating("load_mem_mb"),
        runtime=escalating("runtime"),
        disk_mb=1000,
        gpu=resource("gpu"),
        gpu_model=resource("gpu_model"),
        min_free_gpu_mb=resource("min_free_gpu_mb"),
        constraint=resource("constraint"),
    message:
        "{wildcards.run}: load the model and measure it "
        "({threads} threads, {resources.mem_mb} MB, {resources.runtime} min)"
    script:
        "../scripts/load_model.py"
