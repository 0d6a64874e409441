from snakemake.utils import min_version

min_version("9.0")


include: "workflow/rules/common.smk"


# The first rule is the default target. A workflow that uses this one as a module has its own.
rule all:
    input:
        expand("results/{run}/{file}", run=RUNS, file=["activations.h5", "verification.h5"]),
        [shard for run in RUNS for shard in delivered_shards(run)],
        labelled_reports(),
        [f"results/{name}/pushed.json" for name in RUNS if pushes(name)],
        [f"results/{name}/removed.json" for name in RUNS if not keeps_shards(name)],
    localrule: True
    message:
        "all runs are done"


include: "workflow/rules/freeze_config.smk"
include: "workflow/rules/estimate_memory.smk"
include: "workflow/rules/stage_model.smk"
include: "workflow/rules/load_model.smk"
include: "workflow/rules/tokenize_corpus.smk"
include: "workflow/rules/sample_answers.smk"
include: "workflow/rules/extract_shard.smk"
include: "workflow/rules/extract_shards.smk"
include: "workflow/rules/merge_shards.smk"
include: "workflow/rules/verify.smk"
include: "workflow/rules/push.smk"
include: "workflow/rules/report.smk"
