# Only runs with resources.tokenize_jobs have the jobs of parts: nothing else asks for their files.
rule tokenize_part:
    input:
        config=frozen("tokens"),
        source="results/{run}/source.json",
    output:
        tokens=temp("results/{run}/tokens/{part}-of-{parts}.h5"),
    log:
        "results/{run}/logs/tokenize_part/{part}-of-{parts}.log",
    benchmark:
        "results/{run}/benchmarks/tokenize_part/{part}-of-{parts}.tsv"
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
        disk_mb=4000,
    message:
        "{wildcards.run}: turn part {wildcards.part} of {wildcards.parts} of the corpus into tokens"
    script:
        "../scripts/tokenize_part.py"


rule tokenize_corpus:
    input:
        config=frozen("tokens"),
        source="results/{run}/source.json",
        parts=tokenized_parts,
    output:
        tokens="results/{run}/tokens.h5",
    log:
        "results/{run}/logs/tokenize_corpus.log",
    benchmark:
        "results/{run}/benchmarks/tokenize_corpus.tsv"
    conda:
        "../../envs/theloom.yaml"
    container:
        CONTAINER
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
        disk_mb=4000,
    message:
        "{wildcards.run}: turn the corpus into tokens"
    script:
        "../scripts/tokenize_corpus.py"
