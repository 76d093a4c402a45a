rule build_demo_model:
    """Build a small real language model as a Mistral, from weights that `make` downloaded."""
    output:
        checkpoint=directory("results/models/{model}/checkpoint"),
    log:
        "logs/models/{model}/build_demo_model.log",
    benchmark:
        "benchmarks/models/{model}/build_demo_model.tsv"
    wildcard_constraints:
        model=any_of(BUILD.models_that("transplant")),
    conda:
        "../envs/train.yaml"
    threads: 8
    resources:
        mem_mb=growing(4_000),
        runtime=growing(10),  # minutes
    params:
        settings=lambda wildcards: PARAMS.entry("models", wildcards.model, "transplant"),
        output_version=output_version("demo/build_demo_model"),
    shell:
        "python -m workflow_scripts.demo.build_demo_model --settings {params.settings:q}"
        " --checkpoint {output.checkpoint:q} > {log:q} 2>&1"


rule build_random_model:
    """Build a small Mistral with random weights, for tests."""
    output:
        checkpoint=directory("results/models/{model}/checkpoint"),
    log:
        "logs/models/{model}/build_random_model.log",
    benchmark:
        "benchmarks/models/{model}/build_random_model.tsv"
    wildcard_constraints:
        model=any_of(BUILD.models_that("generate")),
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(10),  # minutes
    params:
        settings=lambda wildcards: PARAMS.entry("models", wildcards.model, "generate"),
        output_version=output_version("demo/build_random_model"),
    shell:
        "python -m workflow_scripts.demo.build_random_model --settings {params.settings:q}"
        " --checkpoint {output.checkpoint:q} > {log:q} 2>&1"


rule build_demo_dataset:
    """Make chats about the Python standard library, from the running interpreter."""
    output:
        conversations="results/data/{dataset}/source/conversations.jsonl",
    log:
        "logs/data/{dataset}/build_demo_dataset.log",
    benchmark:
        "benchmarks/data/{dataset}/build_demo_dataset.tsv"
    wildcard_constraints:
        dataset=any_of(BUILD.generated_datasets),
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        settings=lambda wildcards: PARAMS.entry("datasets", wildcards.dataset, "generate"),
        output_version=output_version("demo/build_demo_dataset"),
    shell:
        "python -m workflow_scripts.demo.build_demo_dataset --settings {params.settings:q}"
        " --conversations {output.conversations:q} > {log:q} 2>&1"
