report: "../report/workflow.rst"


rule figures:
    input:
        [figure for run in RUNS for figure in figures_of(run)],
        expand("results/{run}/report.html", run=RUNS),
        [f"results/_runs/figures/{name}.svg" for name in report_groups.GROUPS["runs"]]
        if len(RUNS) > 1
        else [],
    localrule: True
    message:
        "all figures are drawn"


rule report_page:
    input:
        lambda wildcards: figures_of(wildcards.run),
        config=frozen("report"),
        shards=local_shards,
        activations="results/{run}/activations.h5",
        verification="results/{run}/verification.h5",
    output:
        page="results/{run}/report.html",
    log:
        "results/{run}/logs/report_page.log",
    benchmark:
        "results/{run}/benchmarks/report_page.tsv"
    localrule: True
    conda:
        "../../envs/theloom.yaml"
    message:
        "{wildcards.run}: write report.html"
    script:
        "../scripts/report_page.py"


rule report_memory:
    input:
        config=frozen("report"),
        estimate="results/{run}/estimate.h5",
        model="results/{run}/model.h5",
    output:
        **drawn("memory", "Memory"),
    log:
        "results/{run}/logs/report_memory.log",
    benchmark:
        "results/{run}/benchmarks/report_memory.tsv"
    conda:
        "../../envs/theloom.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    message:
        "{wildcards.run}: draw the figures of memory"
    script:
        "../scripts/report_memory.py"


rule report_speed:
    input:
        config=frozen("report"),
        shards=local_shards,
    output:
        **drawn("speed", "Speed"),
    log:
        "results/{run}/logs/report_speed.log",
    benchmark:
        "results/{run}/benchmarks/report_speed.tsv"
    conda:
        "../../envs/theloom.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    message:
        "{wildcards.run}: draw the figures of speed"
    script:
        "../scripts/report_speed.py"


rule report_answers:
    input:
        config=frozen("report"),
        sampled=sampled_shards,
        answers="results/{run}/answers.h5",
    output:
        **drawn("answers", "Answers"),
    log:
        "results/{run}/logs/report_answers.log",
    benchmark:
        "results/{run}/benchmarks/report_answers.tsv"
    conda:
        "../../envs/theloom.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    message:
        "{wildcards.run}: draw the figures of answers"
    script:
        "../scripts/report_answers.py"


rule report_states:
    input:
        config=frozen("report"),
        shards=local_shards,
        activations="results/{run}/activations.h5",
    output:
        **drawn("states", "Hidden states"),
    log:
        "results/{run}/logs/report_states.log",
    benchmark:
        "results/{run}/benchmarks/report_states.tsv"
    conda:
        "../../envs/theloom.yaml"
    resources:
        mem_mb=4000,
        runtime=30,
    message:
        "{wildcards.run}: draw the figures of hidden states"
    script:
        "../scripts/report_states.py"


rule report_attention:
    input:
        config=frozen("report"),
        shards=local_shards,
        activations="results/{run}/activations.h5",
    output:
        **drawn("attention", "Attention"),
    log:
        "results/{run}/logs/report_attention.log",
    benchmark:
        "results/{run}/benchmarks/report_attention.tsv"
    conda:
        "../../envs/theloom.yaml"
    resources:
        mem_mb=4000,
        runtime=10,
    message:
        "{wildcards.run}: draw the attention patterns"
    script:
        "../scripts/report_attention.py"


rule report_probe:
    input:
        config=frozen("report"),
        shards=local_shards,
        activations="results/{run}/activations.h5",
    output:
        **drawn("probe", "Label"),
    log:
        "results/{run}/logs/report_probe.log",
    benchmark:
        "results/{run}/benchmarks/report_probe.tsv"
    conda:
        "../../envs/theloom.yaml"
    resources:
        mem_mb=4000,
        runtime=60,
    message:
        "{wildcards.run}: train a linear probe of the label at each hook point"
    script:
        "../scripts/report_probe.py"


rule report_runs:
    input:
        activations=expand("results/{run}/activations.h5", run=RUNS),
        models=expand("results/{run}/model.h5", run=RUNS),
        shards=[shard for run in RUNS if keeps_shards(run) for shard in shards_of(run)],
    output:
        **drawn("runs", "Comparison of runs", "results/_runs/figures", None),
    log:
        "results/_runs/logs/report_runs.log",
    benchmark:
        "results/_runs/benchmarks/report_runs.tsv"
    localrule: True  # only this process knows all runs
    conda:
        "../../envs/theloom.yaml"
    resources:
        mem_mb=4000,
        runtime=30,
    message:
        "draw all runs side by side"
    script:
        "../scripts/report_runs.py"
