rule build_demo_dataset:
    """Chats about the Python standard library, from the interpreter's own docstrings."""
    output:
        conversations="results/data/{dataset}/source/conversations.jsonl",
    log:
        "logs/data/{dataset}/build_demo_dataset.log",
    benchmark:
        "benchmarks/data/{dataset}/build_demo_dataset.tsv"
    wildcard_constraints:
        dataset=any_of(GENERATED_DATASETS),
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        settings=lambda wildcards: settings_json("datasets", wildcards.dataset, "generate"),
        output_version=output_version("data/build_demo_dataset"),
    shell:
        "python -m workflow_scripts.data.build_demo_dataset --settings {params.settings:q}"
        " --conversations {output.conversations:q} > {log:q} 2>&1"


rule fetch_dataset:
    """A dataset of the Hugging Face Hub at one commit, as Parquet."""
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
        settings=hub_source_json,
        output_version=output_version("data/fetch_dataset"),
    shell:
        "python -m workflow_scripts.data.fetch_dataset --settings {params.settings:q}"
        " --rows {output.rows:q} --manifest {output.manifest:q} > {log:q} 2>&1"


rule clean_dataset:
    """Keep the usable conversations, reject the rest with reasons, split by a stable hash."""
    input:
        files=dataset_files,
        evaluation_files=evaluation_text_files,
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
    threads: threads_for_dataset
    resources:
        mem_mb=growing(4_000),
        runtime=growing(120),  # minutes
    params:
        settings=cleaning_json,
        sources=source_arguments,
        evaluation=lambda wildcards, input: flagged("--evaluation-files", input.evaluation_files),
        output_version=output_version("data/clean_dataset"),
    shell:
        "python -m workflow_scripts.data.clean_dataset {params.sources:q} {params.evaluation:q}"
        " --settings {params.settings:q} --processes {threads}"
        ' --clean "$(dirname {output.report:q})" > {log:q} 2>&1'


rule render_chats:
    """Token ids by mistral-common, with the spans that training may learn from."""
    input:
        train="results/data/{dataset}/clean/train.parquet",
        validation="results/data/{dataset}/clean/validation.parquet",
        test="results/data/{dataset}/clean/test.parquet",
        tokenizer="results/models/{model}/tokenizer",
    output:
        train="results/data/{dataset}/{model}/tokens/train.arrow",
        validation="results/data/{dataset}/{model}/tokens/validation.arrow",
        test="results/data/{dataset}/{model}/tokens/test.arrow",
        rejected="results/data/{dataset}/{model}/tokens/rejected.parquet",
        report="results/data/{dataset}/{model}/tokens/rendering_report.json",
    log:
        "logs/data/{dataset}/{model}/render_chats.log",
    cache: IS_SHARED
    conda:
        "../envs/data.yaml"
    threads: threads_for_dataset
    resources:
        mem_mb=growing(4_000),
        runtime=growing(120),  # minutes
    params:
        settings=lambda wildcards: settings_json("datasets", wildcards.dataset, "rendering"),
        # Names of folders are in no params, here and in clean_dataset: --cache would tell them apart.
        software=versions_of("ftfy", "rensa", "mistral-common", "tokenizers", "pyarrow"),
        output_version=output_version("data/render_chats"),
    shell:
        'python -m workflow_scripts.data.render_chats --clean "$(dirname {input.train:q})"'
        " --tokenizer {input.tokenizer:q} --settings {params.settings:q} --processes {threads}"
        ' --tokens "$(dirname {output.train:q})" > {log:q} 2>&1'


rule check_tokens:
    """Gate: the same ids by mistral-common and by the tokenizer that ships."""
    input:
        train_chats="results/data/{dataset}/clean/train.parquet",
        validation_chats="results/data/{dataset}/clean/validation.parquet",
        test_chats="results/data/{dataset}/clean/test.parquet",
        train="results/data/{dataset}/{model}/tokens/train.arrow",
        validation="results/data/{dataset}/{model}/tokens/validation.arrow",
        test="results/data/{dataset}/{model}/tokens/test.arrow",
        tokenizer="results/models/{model}/tokenizer",
    output:
        check=update(TOKENS_GATE.verdict),
        passed=TOKENS_GATE.passed,
    log:
        "logs/data/{dataset}/{model}/check_tokens.log",
    benchmark:
        "benchmarks/data/{dataset}/{model}/check_tokens.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(4_000),
        runtime=growing(60),  # minutes
    params:
        settings=TOKENS_GATE.settings,
        clean=subpath(input.train_chats, parent=True),
        tokens=subpath(input.train, parent=True),
        output_version=TOKENS_GATE.version,
        last_attempt=last_attempt(TOKENS_GATE),
    shell:
        "python -m workflow_scripts.data.check_tokens --clean {params.clean:q}"
        " --tokens {params.tokens:q} --tokenizer {input.tokenizer:q}"
        " --settings {params.settings:q} --check {output.check:q} > {log:q} 2>&1"
        " && printf %s {params.settings:q}' '{params.output_version} > {output.passed:q}"


rule pack_sequences:
    """Plan the rows of training: which document, from which token, how many. Copies no token."""
    input:
        tokens="results/data/{dataset}/{model}/tokens/train.arrow",
        tokenizer="results/models/{model}/tokenizer",
        facts="results/models/{model}/facts.json",
        tokens_check=ancient(TOKENS_GATE.verdict),  # gate, read by none
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
        # This packing's table and no more: a new learning rate must not pack again.
        settings=lambda wildcards: settings_json("packings", wildcards.packing),
        output_version=output_version("data/pack_sequences"),
    shell:
        "python -m workflow_scripts.data.pack_sequences --tokens {input.tokens:q}"
        " --tokenizer {input.tokenizer:q} --facts {input.facts:q} --settings {params.settings:q}"
        " --plan {output.plan:q} --report {output.report:q} > {log:q} 2>&1"


rule preview_chats:
    """A page of conversations as the model will see them: tokens, what is supervised, cuts."""
    input:
        chats="results/data/{dataset}/clean/train.parquet",
        tokens="results/data/{dataset}/{model}/tokens/train.arrow",
        tokenizer="results/models/{model}/tokenizer",
        plan="results/data/{dataset}/{model}/{packing}/plan.parquet",
    output:
        preview=report(
            "results/data/{dataset}/{model}/{packing}/preview.html",
            category="Data",
            labels={
                "what": "conversations as tokens",
                "dataset": "{dataset}",
                "model": "{model}",
                "packing": "{packing}",
            },
            caption="../workflow_scripts/report/captions/preview.rst",
        ),
    log:
        "logs/data/{dataset}/{model}/{packing}/preview_chats.log",
    benchmark:
        "benchmarks/data/{dataset}/{model}/{packing}/preview_chats.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(10),  # minutes
    params:
        settings=lambda wildcards: settings_json("datasets", wildcards.dataset, "preview"),
        output_version=output_version("data/preview_chats"),
    shell:
        "python -m workflow_scripts.data.preview_chats --clean {input.chats:q}"
        " --tokens {input.tokens:q} --tokenizer {input.tokenizer:q} --plan {input.plan:q}"
        " --settings {params.settings:q} --preview {output.preview:q} > {log:q} 2>&1"
