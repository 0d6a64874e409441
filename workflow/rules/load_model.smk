rule load_model:
    input:
        config=frozen("model"),
        # a new plan is no reason to load the model again: extraction takes the plan, and this measures one
        estimate=ancient("results/{run}/estimate.h5"),
    output:
        model="results/{run}/model.h5",
    log:
        "results/{run}/logs/load_model.log",
    benchmark:
        "results/{run}/benchmarks/load_model.tsv"
    threads: resource("threads")
    resources:
        mem_mb=memory,
        runtime=resource("runtime"),
        gpu=resource("gpu"),
    script:
        "../scripts/load_model.py"
