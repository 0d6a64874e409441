rule tokenize_corpus:
    input:
        config=frozen("tokens"),
    output:
        tokens="results/{run}/tokens.h5",
    log:
        "results/{run}/logs/tokenize_corpus.log",
    benchmark:
        "results/{run}/benchmarks/tokenize_corpus.tsv"
    conda:
        "../../envs/theloom.yaml"
    threads: 2
    resources:
        mem_mb=4000,
        runtime=60,
    message:
        "{wildcards.run}: turn the corpus into tokens"
    script:
        "../scripts/tokenize_corpus.py"
