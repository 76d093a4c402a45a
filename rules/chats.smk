rule fetch_dataset:
    """Fetch one split of a Hugging Face Hub dataset at one commit, as Parquet."""
    output:
        rows="results/data/{dataset}/hub/{source}/rows.parquet",
        manifest="results/data/{dataset}/hub/{source}/manifest.json",
    log:
        "logs/data/{dataset}/{source}/fetch_dataset.log",
    benchmark:
        "benchmarks/data/{dataset}/{source}/fetch_dataset.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(4_000),
        runtime=growing(240),  # minutes
    params:
        settings=PARAMS.hub_source,
        output_version=output_version("chats/fetch_dataset"),
    shell:
        "python -m workflow_scripts.chats.fetch_dataset --settings {params.settings:q}"
        " --rows {output.rows:q} --manifest {output.manifest:q} > {log:q} 2>&1"


rule clean_dataset:
    """Keep the usable conversations, reject the rest with a reason, and split by a stable hash."""
    input:
        files=USER_FILES.of_dataset,
        evaluation_files=USER_FILES.held_out_of_dataset,
    output:
        train="results/data/{dataset}/clean/train.parquet",
        validation="results/data/{dataset}/clean/validation.parquet",
        test="results/data/{dataset}/clean/test.parquet",
        rejected="results/data/{dataset}/clean/rejected.parquet",
        report="results/data/{dataset}/clean/cleaning_report.json",
    log:
        "logs/data/{dataset}/clean_dataset.log",
    benchmark:
        "benchmarks/data/{dataset}/clean_dataset.tsv"
    conda:
        "../envs/data.yaml"
    threads: RESOURCES.threads_of_dataset
    resources:
        mem_mb=growing(4_000),
        runtime=growing(120),  # minutes
    params:
        settings=PARAMS.cleaning,
        sources=USER_FILES.source_arguments,
        evaluation=lambda wildcards, input: flagged("--evaluation-files", input.evaluation_files),
        output_version=output_version("chats/clean_dataset"),
    shell:
        "python -m workflow_scripts.chats.clean_dataset {params.sources:q} {params.evaluation:q}"
        " --settings {params.settings:q} --processes {threads}"
        ' --clean "$(dirname {output.report:q})" > {log:q} 2>&1'
