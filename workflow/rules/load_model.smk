rule load_model:
    input:
        resources=ancient(frozen("resources")),
        config=frozen("model"),
        # A new plan or corpus is no reason to load the model again. The tokens are here so that a mistake in the corpus
        # ends the run before any weight is loaded.
        estimate=ancient("results/{run}/estimate.h5"),
        tokens=ancient("results/{run}/tokens.h5"),
    output:
        model="results/{run}/model.h5",
    log:
        "results/{run}/logs/load_model.log",
    benchmark:
        "results/{run}/benchmarks/load_model.tsv"
    conda:
        "../../envs/theloom.yaml"
    threads: resource("threads")
    resources:
        mem_mb=memory,
        runtime=resource("runtime"),
        gpu=resource("gpu"),
    message:
        "{wildcards.run}: load the model and measure it"
    script:
        "../scripts/load_model.py"
