rule fetch_base_model:
    """Fetch a base model from the Hugging Face Hub."""
    output:
        checkpoint=directory("results/models/{model}/checkpoint"),
    log:
        "logs/models/{model}/fetch_base_model.log",
    wildcard_constraints:
        model=any_of(BUILD.hub_models),
    # No benchmark: Snakemake's `--cache` does not accept rules with one.
    cache: BUILD.is_shared
    localrule: True
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(240),  # minutes: 94 GB of Mixtral at 10 MB/s
    params:
        settings=PARAMS.base_model,
        output_version=output_version("models/fetch_base_model"),
    shell:
        "python -m workflow_scripts.models.fetch_base_model --settings {params.settings:q}"
        " --checkpoint {output.checkpoint:q} > {log:q} 2>&1"


use rule fetch_base_model as link_base_model with:
    # Link a local folder. Not shared: the links would dangle elsewhere, and Snakemake makes shared
    # outputs writable by everyone, even through links.
    wildcard_constraints:
        model=any_of(BUILD.models_that("is_local")),
    localrule: True
    params:
        content=PARAMS.local_model_hashes,


rule read_model_facts:
    """Read window, heads, context, vocabulary and file hashes from the checkpoint's files."""
    input:
        checkpoint="results/models/{model}/checkpoint",
    output:
        facts="results/models/{model}/facts.json",
    log:
        "logs/models/{model}/read_model_facts.log",
    benchmark:
        "benchmarks/models/{model}/read_model_facts.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(30),  # minutes: every byte is hashed
    params:
        version=PARAMS.facts_arguments,  # renaming this would hash every model again
        output_version=output_version("models/read_model_facts"),
    shell:
        "python -m workflow_scripts.models.read_model_facts --checkpoint {input.checkpoint:q}"
        " {params.version:q} --facts {output.facts:q} > {log:q} 2>&1"


rule export_tokenizer:
    """Export the tokenizer: original file, tokenizer.json, official chat template."""
    input:
        checkpoint="results/models/{model}/checkpoint",
    output:
        tokenizer=directory("results/models/{model}/tokenizer"),
    log:
        "logs/models/{model}/export_tokenizer.log",
    benchmark:
        "benchmarks/models/{model}/export_tokenizer.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(10),  # minutes
    params:
        version=PARAMS.tokenizer_version,
        output_version=output_version("models/export_tokenizer"),
    shell:
        "python -m workflow_scripts.models.export_tokenizer --checkpoint {input.checkpoint:q}"
        " {params.version:q} --tokenizer {output.tokenizer:q} > {log:q} 2>&1"
