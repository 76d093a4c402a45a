# One program scores every kind of link; each rule names the files that make up its own.


rule evaluate_perplexity:
    """Perplexity of a link on the supervised tokens of the test conversations, each one's kept."""
    input:
        gguf="results/runs/{run}/gguf/{run}-F16.gguf",
        gguf_check=ancient(GGUF_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=of_run("results/data/{dataset}/clean/test.parquet"),
        tokens_check=ancient_verdict(TOKENS_GATE),
    output:
        scores="results/runs/{run}/evaluation/F16.json",
        token_scores="results/runs/{run}/evaluation/F16.tokens.parquet",
    log:
        "logs/runs/{run}/evaluate_perplexity/F16.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_perplexity/F16.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_run
    resources:
        gpu=0,  # llama.cpp as it is installed here
        mem_mb=memory_for_models(1.1),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: ["--gguf", input.gguf],
        settings=scoring_json(),
        output_version=output_version("evaluate/evaluate_perplexity"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_perplexity {params.link:q}"
        " --facts {input.facts:q} --tokens {input.tokens:q} --clean {input.clean:q}"
        " --settings {params.settings:q} --threads {threads} --scores {output.scores:q}"
        " --token-scores {output.token_scores:q} > {log:q} 2>&1"


use rule evaluate_perplexity as evaluate_perplexity_quantization with:
    # Its divergence from F16 comes from the same pass.
    input:
        gguf="results/runs/{run}/gguf/{run}-{quant}.gguf",
        reference="results/runs/{run}/gguf/{run}-F16.gguf",
        gguf_check=ancient(GGUF_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=of_run("results/data/{dataset}/clean/test.parquet"),
        tokens_check=ancient_verdict(TOKENS_GATE),
    output:
        scores="results/runs/{run}/evaluation/{quant}.json",
        token_scores="results/runs/{run}/evaluation/{quant}.tokens.parquet",
        divergence="results/runs/{run}/evaluation/{quant}.divergence.json",
    log:
        "logs/runs/{run}/evaluate_perplexity/{quant}.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_perplexity/{quant}.tsv"
    resources:
        gpu=0,
        # Both models; with less the program takes them in turns.
        mem_mb=memory_for_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input, output: [
            *("--gguf", input.gguf, "--reference", input.reference),
            *("--divergence", output.divergence),
        ],
        settings=scoring_json(),
        output_version=output_version("evaluate/evaluate_perplexity"),


use rule evaluate_perplexity as evaluate_perplexity_merged with:
    input:
        checkpoint="results/runs/{run}/merged",
        merged_check=ancient(MERGED_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=of_run("results/data/{dataset}/clean/test.parquet"),
        tokens_check=ancient_verdict(TOKENS_GATE),
    output:
        scores="results/runs/{run}/evaluation/merged.json",
        token_scores="results/runs/{run}/evaluation/merged.tokens.parquet",
    log:
        "logs/runs/{run}/evaluate_perplexity/merged.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_perplexity/merged.tsv"
    resources:
        gpu=gpus_for_run,
        mem_mb=memory_for_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings=scoring_json(),
        output_version=output_version("evaluate/evaluate_perplexity"),


use rule evaluate_perplexity_merged as evaluate_perplexity_awq with:
    input:
        checkpoint="results/runs/{run}/awq",
        facts=of_run("results/models/{model}/facts.json"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=of_run("results/data/{dataset}/clean/test.parquet"),
        tokens_check=ancient_verdict(TOKENS_GATE),
    output:
        scores="results/runs/{run}/evaluation/awq.json",
        token_scores="results/runs/{run}/evaluation/awq.tokens.parquet",
    log:
        "logs/runs/{run}/evaluate_perplexity/awq.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_perplexity/awq.tsv"


use rule evaluate_perplexity_merged as evaluate_perplexity_adapter with:
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        facts=of_run("results/models/{model}/facts.json"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=of_run("results/data/{dataset}/clean/test.parquet"),
        tokens_check=ancient_verdict(TOKENS_GATE),
    output:
        scores="results/runs/{run}/evaluation/adapter.json",
        token_scores="results/runs/{run}/evaluation/adapter.tokens.parquet",
    log:
        "logs/runs/{run}/evaluate_perplexity/adapter.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_perplexity/adapter.tsv"
    params:
        link=lambda wildcards, input: live_adapter(wildcards, input),
        settings=scoring_json(),
        output_version=output_version("evaluate/evaluate_perplexity"),


use rule evaluate_perplexity_merged as evaluate_perplexity_base with:
    input:
        checkpoint="results/models/{model}/checkpoint",
        facts="results/models/{model}/facts.json",
        tokens="results/data/{dataset}/{model}/tokens/test.arrow",
        clean="results/data/{dataset}/clean/test.parquet",
        tokens_check=ancient(TOKENS_GATE.verdict),  # gate, read by none
    output:
        scores="results/evaluation/{model}/{dataset}/base{precision}.json",
        token_scores="results/evaluation/{model}/{dataset}/base{precision}.tokens.parquet",
    log:
        "logs/evaluation/{model}/{dataset}/evaluate_perplexity/base{precision}.log",
    benchmark:
        "benchmarks/evaluation/{model}/{dataset}/evaluate_perplexity/base{precision}.tsv"
    wildcard_constraints:
        precision="(-nf4)?",
    threads: threads_for_model
    resources:
        gpu=gpus_for_model,
        mem_mb=memory_for_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: [
            "--checkpoint",
            input.checkpoint,
            "--precision",
            wildcards.precision.removeprefix("-") or "native",
        ],
        settings=scoring_json(),
        output_version=output_version("evaluate/evaluate_perplexity"),


rule chunk_text:
    """A text of the user's in chunks of one context, as llama-perplexity cuts it."""
    input:
        text=evaluation_text,
        tokenizer="results/models/{model}/tokenizer",
        facts="results/models/{model}/facts.json",
    output:
        tokens="results/evaluation/{model}/texts/{text}.arrow",
    log:
        "logs/evaluation/{model}/chunk_text/{text}.log",
    benchmark:
        "benchmarks/evaluation/{model}/chunk_text/{text}.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(4_000),
        runtime=growing(30),  # minutes
    params:
        settings=CONFIG.evaluation.model_dump_json(include={"text_context_tokens"}),
        output_version=output_version("evaluate/chunk_text"),
    shell:
        "python -m workflow_scripts.evaluate.chunk_text --text {input.text:q}"
        " --tokenizer {input.tokenizer:q} --facts {input.facts:q} --settings {params.settings:q}"
        " --tokens {output.tokens:q} > {log:q} 2>&1"


rule evaluate_text:
    """Perplexity of a GGUF on a text of the user's, as llama-perplexity has it."""
    input:
        gguf="results/runs/{run}/gguf/{run}-{gguf}.gguf",
        gguf_check=ancient(GGUF_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokens=text_of_run,
    output:
        scores="results/runs/{run}/evaluation/texts/{text}/{gguf}.json",
        token_scores="results/runs/{run}/evaluation/texts/{text}/{gguf}.tokens.parquet",
    log:
        "logs/runs/{run}/evaluate_text/{text}/{gguf}.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_text/{text}/{gguf}.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_run
    resources:
        gpu=0,  # llama.cpp as it is installed here
        mem_mb=memory_for_models(1.1),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: ["--gguf", input.gguf],
        settings="{}",  # every chunk, whole
        output_version=output_version("evaluate/evaluate_perplexity"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_perplexity {params.link:q}"
        " --facts {input.facts:q} --tokens {input.tokens:q} --settings {params.settings:q}"
        " --threads {threads} --scores {output.scores:q}"
        " --token-scores {output.token_scores:q} > {log:q} 2>&1"


use rule evaluate_text as evaluate_text_merged with:
    input:
        checkpoint="results/runs/{run}/merged",
        merged_check=ancient(MERGED_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokens=text_of_run,
    output:
        scores="results/runs/{run}/evaluation/texts/{text}/merged.json",
        token_scores="results/runs/{run}/evaluation/texts/{text}/merged.tokens.parquet",
    log:
        "logs/runs/{run}/evaluate_text/{text}/merged.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_text/{text}/merged.tsv"
    resources:
        gpu=gpus_for_run,
        mem_mb=memory_for_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings="{}",
        output_version=output_version("evaluate/evaluate_perplexity"),


use rule evaluate_text_merged as evaluate_text_base with:
    input:
        checkpoint="results/models/{model}/checkpoint",
        facts="results/models/{model}/facts.json",
        tokens="results/evaluation/{model}/texts/{text}.arrow",
    output:
        scores="results/evaluation/{model}/texts/{text}/base.json",
        token_scores="results/evaluation/{model}/texts/{text}/base.tokens.parquet",
    log:
        "logs/evaluation/{model}/evaluate_text/{text}/base.log",
    benchmark:
        "benchmarks/evaluation/{model}/evaluate_text/{text}/base.tsv"
    threads: threads_for_model
    resources:
        gpu=gpus_for_model,
        mem_mb=memory_for_models(2),
        runtime=growing(240),  # minutes


rule evaluate_positions:
    """Loss of a run's live adapter by position, on whole validation conversations."""
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        facts=of_run("results/models/{model}/facts.json"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
        tokens_check=ancient_verdict(TOKENS_GATE),
    output:
        scores="results/runs/{run}/evaluation/positions.json",
    log:
        "logs/runs/{run}/evaluate_positions.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_positions.tsv"
    conda:
        "../envs/train.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=memory_for_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: live_adapter(wildcards, input),
        settings=CONFIG.evaluation.model_dump_json(include={"max_conversations"}),
        output_version=output_version("evaluate/evaluate_positions"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_positions {params.link:q}"
        " --facts {input.facts:q} --tokens {input.tokens:q} --settings {params.settings:q}"
        " --scores {output.scores:q} > {log:q} 2>&1"


use rule evaluate_perplexity_adapter as evaluate_validation with:
    # Sweeps choose by it: the test split stays unseen.
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        facts=of_run("results/models/{model}/facts.json"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
        clean=of_run("results/data/{dataset}/clean/validation.parquet"),
        tokens_check=ancient_verdict(TOKENS_GATE),
    output:
        scores="results/runs/{run}/evaluation/validation.json",
        token_scores="results/runs/{run}/evaluation/validation.tokens.parquet",
    log:
        "logs/runs/{run}/evaluate_validation.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_validation.tsv"
    params:
        link=lambda wildcards, input: live_adapter(wildcards, input),
        settings=scoring_json(),
        output_version=output_version("evaluate/evaluate_perplexity"),
