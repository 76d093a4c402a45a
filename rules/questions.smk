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
    """Usable context of a link: questions on long texts, up to the context that it serves."""
    input:
        unpack(files_of_link),
        facts=of_place("results/models/{model}/facts.json"),
        tokenizer=of_place("results/models/{model}/tokenizer"),
        texts=context_text_files(),
        tokens=of_place("results/data/{dataset}/{model}/tokens/test.arrow"),
    output:
        scores=measured_chain.FILES["context"],
    log:
        "logs/{place}/evaluate_context/{link}.log",
    benchmark:
        "benchmarks/{place}/evaluate_context/{link}.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_link
    resources:
        gpu=gpus_for_link,
        mem_mb=memory_for_models(2),
        runtime=growing(480),  # minutes
    params:
        link=link_arguments,
        settings=context_json(),
        texts=flagged("--texts", context_text_files()),
        output_version=output_version("evaluate/evaluate_context"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_context {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} {params.texts:q}"
        " --tokens {input.tokens:q} --settings {params.settings:q} --threads {threads}"
        " --scores {output.scores:q} > {log:q} 2>&1"


rule answer_prompts:
    """Greedy answers of a link to the first prompts of the test split."""
    input:
        unpack(files_of_link),
        facts=of_place("results/models/{model}/facts.json"),
        tokenizer=of_place("results/models/{model}/tokenizer"),
        tokens=of_place("results/data/{dataset}/{model}/tokens/test.arrow"),
    output:
        answers=measured_chain.FILES["answers"],
    log:
        "logs/{place}/answer_prompts/{link}.log",
    benchmark:
        "benchmarks/{place}/answer_prompts/{link}.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_link
    resources:
        gpu=gpus_for_link,
        mem_mb=memory_for_models(2),
        runtime=growing(60),  # minutes
    params:
        link=link_arguments,
        settings=samples_json(),
        output_version=output_version("evaluate/answer_prompts"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.answer_prompts {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --tokens {input.tokens:q}"
        " --settings {params.settings:q} --threads {threads} --answers {output.answers:q}"
        " > {log:q} 2>&1"
