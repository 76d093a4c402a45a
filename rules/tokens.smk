rule render_chats:
    """Render conversations to token ids with mistral-common, and mark the supervised spans."""
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
    cache: BUILD.is_shared
    conda:
        "../envs/data.yaml"
    threads: RESOURCES.threads_of_dataset
    resources:
        mem_mb=growing(4_000),
        runtime=growing(120),  # minutes
    params:
        settings=lambda wildcards: PARAMS.entry("datasets", wildcards.dataset, "rendering"),
        # No folder names in params, as in clean_dataset: they would change the key of --cache.
        software=PARAMS.versions_of("ftfy", "rensa", "mistral-common", "tokenizers", "pyarrow"),
        output_version=output_version("tokens/render_chats"),
    shell:
        'python -m workflow_scripts.tokens.render_chats --clean "$(dirname {input.train:q})"'
        " --tokenizer {input.tokenizer:q} --settings {params.settings:q} --processes {threads}"
        ' --tokens "$(dirname {output.train:q})" > {log:q} 2>&1'


rule check_tokens:
    """Gate: mistral-common and the exported tokenizer give the same ids."""
    input:
        train_chats="results/data/{dataset}/clean/train.parquet",
        validation_chats="results/data/{dataset}/clean/validation.parquet",
        test_chats="results/data/{dataset}/clean/test.parquet",
        train="results/data/{dataset}/{model}/tokens/train.arrow",
        validation="results/data/{dataset}/{model}/tokens/validation.arrow",
        test="results/data/{dataset}/{model}/tokens/test.arrow",
        tokenizer="results/models/{model}/tokenizer",
    output:
        check=update(GATES.tokens.verdict),
        passed=GATES.tokens.passed,
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
        settings=GATES.tokens.settings,
        clean=subpath(input.train_chats, parent=True),
        tokens=subpath(input.train, parent=True),
        output_version=GATES.tokens.version,
        last_attempt=GATES.last_attempt(GATES.tokens),
    shell:
        "python -m workflow_scripts.tokens.check_tokens --clean {params.clean:q}"
        " --tokens {params.tokens:q} --tokenizer {input.tokenizer:q}"
        " --settings {params.settings:q} --check {output.check:q} > {log:q} 2>&1"
        " && printf %s {params.settings:q}' '{params.output_version} > {output.passed:q}"
