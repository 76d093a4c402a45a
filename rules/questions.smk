rule evaluate_recall:
    """Facts that a run's live adapter finds again in held-out text, by length and depth."""
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        chats=of_run("results/data/{dataset}/clean/validation.parquet"),
    output:
        scores="results/runs/{run}/evaluation/recall.json",
    log:
        "logs/runs/{run}/evaluate_recall.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_recall.tsv"
    conda:
        "../envs/train.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=memory_for_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: live_adapter(wildcards, input),
        settings=CONFIG.evaluation.recall.model_dump_json(),
        output_version=output_version("evaluate/evaluate_recall"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_recall {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --chats {input.chats:q}"
        " --settings {params.settings:q} --scores {output.scores:q} > {log:q} 2>&1"


rule evaluate_context:
    """Usable context of a GGUF: questions on long texts, up to what it serves."""
    input:
        gguf="results/runs/{run}/gguf/{run}-{gguf}.gguf",
        gguf_check=ancient(GGUF_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        texts=context_text_files(),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
    output:
        scores="results/runs/{run}/evaluation/{gguf}.context.json",
    log:
        "logs/runs/{run}/evaluate_context/{gguf}.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_context/{gguf}.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=memory_for_models(2),
        runtime=growing(480),  # minutes
    params:
        link=lambda wildcards, input: ["--gguf", input.gguf],
        settings=context_json(),
        texts=flagged("--texts", context_text_files()),
        output_version=output_version("evaluate/evaluate_context"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_context {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} {params.texts:q}"
        " --tokens {input.tokens:q} --settings {params.settings:q} --threads {threads}"
        " --scores {output.scores:q} > {log:q} 2>&1"


use rule evaluate_context as evaluate_context_merged with:
    input:
        checkpoint="results/runs/{run}/merged",
        merged_check=ancient(MERGED_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        texts=context_text_files(),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
    output:
        scores="results/runs/{run}/evaluation/merged.context.json",
    log:
        "logs/runs/{run}/evaluate_context/merged.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_context/merged.tsv"
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings=context_json(),
        texts=flagged("--texts", context_text_files()),
        output_version=output_version("evaluate/evaluate_context"),


use rule evaluate_context as evaluate_context_base with:
    input:
        checkpoint="results/models/{model}/checkpoint",
        facts="results/models/{model}/facts.json",
        tokenizer="results/models/{model}/tokenizer",
        texts=context_text_files(),
        tokens="results/data/{dataset}/{model}/tokens/test.arrow",
    output:
        scores="results/evaluation/{model}/{dataset}/base.context.json",
    log:
        "logs/evaluation/{model}/{dataset}/evaluate_context.log",
    benchmark:
        "benchmarks/evaluation/{model}/{dataset}/evaluate_context.tsv"
    threads: threads_for_model
    resources:
        gpu=gpus_for_model,
        mem_mb=memory_for_models(2),
        runtime=growing(480),  # minutes
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings=context_json(),
        texts=flagged("--texts", context_text_files()),
        output_version=output_version("evaluate/evaluate_context"),


rule answer_prompts:
    """Greedy answers of a GGUF to the first prompts of the test split."""
    input:
        gguf="results/runs/{run}/gguf/{run}-{gguf}.gguf",
        gguf_check=ancient(GGUF_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
    output:
        answers="results/runs/{run}/evaluation/{gguf}.answers.json",
    log:
        "logs/runs/{run}/answer_prompts/{gguf}.log",
    benchmark:
        "benchmarks/runs/{run}/answer_prompts/{gguf}.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=memory_for_models(2),
        runtime=growing(60),  # minutes
    params:
        link=lambda wildcards, input: ["--gguf", input.gguf],
        settings=samples_json(),
        output_version=output_version("evaluate/answer_prompts"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.answer_prompts {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --tokens {input.tokens:q}"
        " --settings {params.settings:q} --threads {threads} --answers {output.answers:q}"
        " > {log:q} 2>&1"


use rule answer_prompts as answer_prompts_merged with:
    input:
        checkpoint="results/runs/{run}/merged",
        merged_check=ancient(MERGED_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
    output:
        answers="results/runs/{run}/evaluation/merged.answers.json",
    log:
        "logs/runs/{run}/answer_prompts/merged.log",
    benchmark:
        "benchmarks/runs/{run}/answer_prompts/merged.tsv"
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings=samples_json(),
        output_version=output_version("evaluate/answer_prompts"),


use rule answer_prompts as answer_prompts_base with:
    input:
        checkpoint="results/models/{model}/checkpoint",
        facts="results/models/{model}/facts.json",
        tokenizer="results/models/{model}/tokenizer",
        tokens="results/data/{dataset}/{model}/tokens/test.arrow",
    output:
        answers="results/evaluation/{model}/{dataset}/base.answers.json",
    log:
        "logs/evaluation/{model}/{dataset}/answer_prompts.log",
    benchmark:
        "benchmarks/evaluation/{model}/{dataset}/answer_prompts.tsv"
    threads: threads_for_model
    resources:
        gpu=gpus_for_model,
        mem_mb=memory_for_models(2),
        runtime=growing(60),  # minutes
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings=samples_json(),
        output_version=output_version("evaluate/answer_prompts"),
