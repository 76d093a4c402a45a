rule pack_sequences:
    """Plan the rows of training: which document, from which token, how many. Copies no token."""
    input:
        tokens="results/data/{dataset}/{model}/tokens/train.arrow",
        tokenizer="results/models/{model}/tokenizer",
        facts="results/models/{model}/facts.json",
        tokens_check=ancient(GATES.tokens.verdict),  # gate; the program does not read it
    output:
        plan="results/data/{dataset}/{model}/{packing}/plan.parquet",
        report="results/data/{dataset}/{model}/{packing}/packing_report.json",
    log:
        "logs/data/{dataset}/{model}/{packing}/pack_sequences.log",
    benchmark:
        "benchmarks/data/{dataset}/{model}/{packing}/pack_sequences.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(10),  # minutes
    params:
        # Only this packing's table: a new learning rate must not pack again.
        settings=lambda wildcards: PARAMS.entry("packings", wildcards.packing),
        output_version=output_version("packing/pack_sequences"),
    shell:
        "python -m workflow_scripts.packing.pack_sequences --tokens {input.tokens:q}"
        " --tokenizer {input.tokenizer:q} --facts {input.facts:q} --settings {params.settings:q}"
        " --plan {output.plan:q} --report {output.report:q} > {log:q} 2>&1"
