# Each rule measures every link; handover/chain.py says which files a link consists of.


rule evaluate_perplexity:
    """Perplexity of a link on supervised tokens of the test split, with the loss of every token."""
    input:
        unpack(LINKS.files),
        facts=BUILD.of_place("results/models/{model}/facts.json"),
        tokens=BUILD.of_place("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=BUILD.of_place("results/data/{dataset}/clean/test.parquet"),
        tokens_check=ancient(BUILD.of_place(GATES.tokens.verdict)),  # gate, read by none
    output:
        scores=measured_chain.FILES["scores"],
        token_scores=measured_chain.token_scores_beside(measured_chain.FILES["scores"]),
    log:
        "logs/{place}/evaluate_perplexity/{link}.log",
    benchmark:
        "benchmarks/{place}/evaluate_perplexity/{link}.tsv"
    wildcard_constraints:
        link=any_of(BUILD.links.keys() - BUILD.compared_links),
    conda:
        "../envs/export.yaml"
    threads: RESOURCES.threads_of_link
    resources:
        gpu=RESOURCES.gpus_of_scoring,
        mem_mb=RESOURCES.memory_of_scoring,
        runtime=growing(240),  # minutes
    params:
        link=LINKS.arguments,
        settings=PARAMS.scoring(),
        output_version=output_version("evaluate/evaluate_perplexity"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_perplexity {params.link:q}"
        " --facts {input.facts:q} --tokens {input.tokens:q} --clean {input.clean:q}"
        " --settings {params.settings:q} --threads {threads} --scores {output.scores:q}"
        " --token-scores {output.token_scores:q} > {log:q} 2>&1"


use rule evaluate_perplexity as evaluate_quantization with:
    # A quantization is compared token by token with its source, in the same pass.
    input:
        unpack(LINKS.files),
        reference=LINKS.source,
        facts=BUILD.of_place("results/models/{model}/facts.json"),
        tokens=BUILD.of_place("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=BUILD.of_place("results/data/{dataset}/clean/test.parquet"),
        tokens_check=ancient(BUILD.of_place(GATES.tokens.verdict)),  # gate, read by none
    output:
        scores=measured_chain.FILES["scores"],
        token_scores=measured_chain.token_scores_beside(measured_chain.FILES["scores"]),
        divergence=measured_chain.FILES["divergence"],
    wildcard_constraints:
        link=any_of(BUILD.compared_links),
    resources:
        gpu=RESOURCES.gpus_of_scoring,
        # Both models; with less memory they take turns.
        mem_mb=memory_of_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input, output: [
            *LINKS.arguments(wildcards, input),
            *("--reference", input.reference),
            *("--divergence", output.divergence),
        ],
        settings=PARAMS.scoring(),
        output_version=output_version("evaluate/evaluate_perplexity"),


rule chunk_text:
    """Cut a user's text into chunks of one context, as llama-perplexity does."""
    input:
        text=USER_FILES.evaluation_text,
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
        settings=PARAMS.texts(),
        output_version=output_version("evaluate/chunk_text"),
    shell:
        "python -m workflow_scripts.evaluate.chunk_text --text {input.text:q}"
        " --tokenizer {input.tokenizer:q} --facts {input.facts:q} --settings {params.settings:q}"
        " --tokens {output.tokens:q} > {log:q} 2>&1"


rule evaluate_text:
    """Perplexity of a link on a user's text, computed as in llama-perplexity."""
    input:
        unpack(LINKS.files),
        facts=BUILD.of_place("results/models/{model}/facts.json"),
        tokens=BUILD.of_place("results/evaluation/{model}/texts/{text}.arrow"),
    output:
        scores=measured_chain.FILES["text"],
        token_scores=measured_chain.token_scores_beside(measured_chain.FILES["text"]),
    log:
        "logs/{place}/evaluate_text/{text}/{link}.log",
    benchmark:
        "benchmarks/{place}/evaluate_text/{text}/{link}.tsv"
    conda:
        "../envs/export.yaml"
    threads: RESOURCES.threads_of_link
    resources:
        gpu=RESOURCES.gpus_of_scoring,
        mem_mb=RESOURCES.memory_of_scoring,
        runtime=growing(240),  # minutes
    params:
        link=LINKS.arguments,
        settings="{}",  # every chunk, whole
        output_version=output_version("evaluate/evaluate_perplexity"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_perplexity {params.link:q}"
        " --facts {input.facts:q} --tokens {input.tokens:q} --settings {params.settings:q}"
        " --threads {threads} --scores {output.scores:q}"
        " --token-scores {output.token_scores:q} > {log:q} 2>&1"


rule evaluate_positions:
    """Loss of a run's live adapter by position, on whole validation conversations."""
    input:
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        tokens=BUILD.of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
        tokens_check=GATES.verdict_of_tokens(),
    output:
        scores="results/runs/{run}/evaluation/positions.json",
    log:
        "logs/runs/{run}/evaluate_positions.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_positions.tsv"
    conda:
        "../envs/train.yaml"
    threads: RESOURCES.threads_of_run
    resources:
        gpu=RESOURCES.gpus_of_run,
        mem_mb=memory_of_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: LINKS.live_adapter(wildcards.run, input),
        settings=PARAMS.positions(),
        output_version=output_version("evaluate/evaluate_positions"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_positions {params.link:q}"
        " --facts {input.facts:q} --tokens {input.tokens:q} --settings {params.settings:q}"
        " --scores {output.scores:q} > {log:q} 2>&1"


use rule evaluate_perplexity as evaluate_validation with:
    # Perplexity of a run's live adapter. Sweeps select by it, so that the test split stays unseen.
    input:
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        tokens=BUILD.of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
        clean=BUILD.of_run("results/data/{dataset}/clean/validation.parquet"),
        tokens_check=GATES.verdict_of_tokens(),
    output:
        scores="results/runs/{run}/evaluation/validation.json",
        token_scores="results/runs/{run}/evaluation/validation.tokens.parquet",
    log:
        "logs/runs/{run}/evaluate_validation.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_validation.tsv"
    threads: RESOURCES.threads_of_run
    resources:
        gpu=RESOURCES.gpus_of_run,
        mem_mb=memory_of_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: LINKS.live_adapter(wildcards.run, input),
        settings=PARAMS.scoring(),
        output_version=output_version("evaluate/evaluate_perplexity"),


rule evaluate_recall:
    """Recall of facts in held-out text by a run's live adapter, by length and depth."""
    input:
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        tokenizer=BUILD.of_run("results/models/{model}/tokenizer"),
        chats=BUILD.of_run("results/data/{dataset}/clean/validation.parquet"),
    output:
        scores="results/runs/{run}/evaluation/recall.json",
    log:
        "logs/runs/{run}/evaluate_recall.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_recall.tsv"
    conda:
        "../envs/train.yaml"
    threads: RESOURCES.threads_of_run
    resources:
        gpu=RESOURCES.gpus_of_run,
        mem_mb=memory_of_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: LINKS.live_adapter(wildcards.run, input),
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
        unpack(LINKS.files),
        facts=BUILD.of_place("results/models/{model}/facts.json"),
        tokenizer=BUILD.of_place("results/models/{model}/tokenizer"),
        texts=USER_FILES.context_texts(),
        tokens=BUILD.of_place("results/data/{dataset}/{model}/tokens/test.arrow"),
    output:
        scores=measured_chain.FILES["context"],
    log:
        "logs/{place}/evaluate_context/{link}.log",
    benchmark:
        "benchmarks/{place}/evaluate_context/{link}.tsv"
    conda:
        "../envs/export.yaml"
    threads: RESOURCES.threads_of_link
    resources:
        gpu=RESOURCES.gpus_of_link,
        mem_mb=memory_of_models(2),
        runtime=growing(480),  # minutes
    params:
        link=LINKS.arguments,
        settings=PARAMS.context(),
        texts=flagged("--texts", USER_FILES.context_texts()),
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
        unpack(LINKS.files),
        facts=BUILD.of_place("results/models/{model}/facts.json"),
        tokenizer=BUILD.of_place("results/models/{model}/tokenizer"),
        tokens=BUILD.of_place("results/data/{dataset}/{model}/tokens/test.arrow"),
    output:
        answers=measured_chain.FILES["answers"],
    log:
        "logs/{place}/answer_prompts/{link}.log",
    benchmark:
        "benchmarks/{place}/answer_prompts/{link}.tsv"
    conda:
        "../envs/export.yaml"
    threads: RESOURCES.threads_of_link
    resources:
        gpu=RESOURCES.gpus_of_link,
        mem_mb=memory_of_models(2),
        runtime=growing(60),  # minutes
    params:
        link=LINKS.arguments,
        settings=PARAMS.samples(),
        output_version=output_version("evaluate/answer_prompts"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.answer_prompts {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --tokens {input.tokens:q}"
        " --settings {params.settings:q} --threads {threads} --answers {output.answers:q}"
        " > {log:q} 2>&1"


rule fetch_tasks:
    """Fetch the data of the tasks from the Hub into the cache of `datasets`; needs a connection."""
    input:
        files=USER_FILES.tasks(),
    output:
        fetched="results/evaluation/tasks.json",
    log:
        "logs/evaluation/fetch_tasks.log",
    benchmark:
        "benchmarks/evaluation/fetch_tasks.tsv"
    localrule: True
    conda:
        "../envs/tasks.yaml"
    resources:
        mem_mb=growing(4_000),
        runtime=growing(120),  # minutes
    params:
        settings=PARAMS.task_data(),
        output_version=output_version("evaluate/fetch_tasks"),
    shell:
        "python -m workflow_scripts.evaluate.fetch_tasks --settings {params.settings:q}"
        " --fetched {output.fetched:q} > {log:q} 2>&1"


rule evaluate_tasks:
    """Scores of a link in tasks of lm-evaluation-harness."""
    input:
        unpack(LINKS.files),
        facts=BUILD.of_place("results/models/{model}/facts.json"),
        tokenizer=BUILD.of_place("results/models/{model}/tokenizer"),
        fetched="results/evaluation/tasks.json",  # the data itself is in the cache
        files=USER_FILES.tasks(),
    output:
        scores=measured_chain.FILES["tasks"],
        samples=measured_chain.samples_beside(measured_chain.FILES["tasks"]),
    log:
        "logs/{place}/evaluate_tasks/{link}.log",
    benchmark:
        "benchmarks/{place}/evaluate_tasks/{link}.tsv"
    conda:
        "../envs/tasks.yaml"
    threads: RESOURCES.threads_of_link
    resources:
        gpu=RESOURCES.gpus_of_link,
        mem_mb=memory_of_models(2),
        runtime=growing(1_440),  # minutes
    params:
        link=LINKS.arguments,
        settings=PARAMS.tasks(),
        output_version=output_version("evaluate/evaluate_tasks"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_tasks {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --settings {params.settings:q}"
        " --threads {threads} --scores {output.scores:q} --samples {output.samples:q}"
        " > {log:q} 2>&1"


rule match_references:
    """Exact match of a link's answers with the reference answers of the test split."""
    input:
        unpack(LINKS.files),
        facts=BUILD.of_place("results/models/{model}/facts.json"),
        tokenizer=BUILD.of_place("results/models/{model}/tokenizer"),
        tokens=BUILD.of_place("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=BUILD.of_place("results/data/{dataset}/clean/test.parquet"),
    output:
        scores=measured_chain.FILES["references"],
        samples=measured_chain.samples_beside(measured_chain.FILES["references"]),
    log:
        "logs/{place}/match_references/{link}.log",
    benchmark:
        "benchmarks/{place}/match_references/{link}.tsv"
    conda:
        "../envs/export.yaml"
    threads: RESOURCES.threads_of_link
    resources:
        gpu=RESOURCES.gpus_of_link,
        mem_mb=memory_of_models(2),
        runtime=growing(240),  # minutes
    params:
        link=LINKS.arguments,
        settings=PARAMS.references(),
        output_version=output_version("evaluate/match_references"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.match_references {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --tokens {input.tokens:q}"
        " --clean {input.clean:q} --settings {params.settings:q} --threads {threads}"
        " --scores {output.scores:q} --samples {output.samples:q} > {log:q} 2>&1"


rule benchmark_inference:
    """Speed, memory and size of a link, alone on the machine: it uses all cores."""
    input:
        unpack(LINKS.files),
        facts=BUILD.of_place("results/models/{model}/facts.json"),
    output:
        speed=measured_chain.FILES["speed"],
    log:
        "logs/{place}/benchmark_inference/{link}.log",
    benchmark:
        "benchmarks/{place}/benchmark_inference/{link}.tsv"
    conda:
        "../envs/export.yaml"
    threads: RESOURCES.all_cores()
    resources:
        gpu=RESOURCES.gpus_of_scoring,
        mem_mb=RESOURCES.memory_of_scoring,
        runtime=growing(60),  # minutes
    params:
        link=LINKS.arguments,
        settings=CONFIG.evaluation.inference.model_dump_json(),
        output_version=output_version("evaluate/benchmark_inference"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.benchmark_inference {params.link:q}"
        " --facts {input.facts:q} --settings {params.settings:q} --threads {threads}"
        " --speed {output.speed:q} > {log:q} 2>&1"
