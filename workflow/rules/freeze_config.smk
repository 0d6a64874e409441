rule freeze_config:
    output:
        config="results/{run}/config/{stage}.json",
    log:
        "results/{run}/logs/freeze_config/{stage}.log",
    benchmark:
        "results/{run}/benchmarks/freeze_config/{stage}.tsv"
    localrule: True
    conda:
        "../../envs/theloom.yaml"
    params:
        config=lambda wildcards: stage(wildcards.run, wildcards.stage),
    message:
        "{wildcards.run}: freeze the config of stage {wildcards.stage}"
    script:
        "../scripts/freeze_config.py"
