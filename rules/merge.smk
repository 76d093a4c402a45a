rule fetch_adapter:
    """Copy a user's adapter (`runs.<name>.adapter`), after a check that it fits its base."""
    input:
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
        given=lambda wildcards: USER_FILES.of_beginning(wildcards.run),
    output:
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        config="results/runs/{run}/adapter/adapter_config.json",
        source="results/runs/{run}/adapter/source.json",
    log:
        "logs/runs/{run}/fetch_adapter.log",
    benchmark:
        "benchmarks/runs/{run}/fetch_adapter.tsv"
    wildcard_constraints:
        run=BUILD.any_run_of(BUILD.adapter_runs),
    localrule: True
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=growing(4_000),
        runtime=growing(60),  # minutes
    params:
        settings=PARAMS.beginning,
        adapter=subpath(output.adapter, parent=True),
        output_version=output_version("merge/fetch_adapter"),
    shell:
        "python -m workflow_scripts.merge.fetch_adapter --settings {params.settings:q}"
        " --checkpoint {input.checkpoint:q} --adapter {params.adapter:q} > {log:q} 2>&1"


rule fetch_merged:
    """Link to a user's fine-tuned model (`runs.<name>.merged`), or download it from the Hub."""
    input:
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        tokenizer=BUILD.of_run("results/models/{model}/tokenizer"),
        given=lambda wildcards: USER_FILES.of_beginning(wildcards.run),
    output:
        merged=BUILD.kept("merged", directory("results/runs/{run}/merged")),
    log:
        "logs/runs/{run}/fetch_merged.log",
    benchmark:
        "benchmarks/runs/{run}/fetch_merged.tsv"
    wildcard_constraints:
        run=BUILD.any_run_of(BUILD.merged_runs),
    localrule: True
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(240),  # minutes: 94 GB of Mixtral at 10 MB/s
    params:
        settings=PARAMS.beginning,
        output_version=output_version("merge/fetch_merged"),
    shell:
        "python -m workflow_scripts.merge.fetch_merged --settings {params.settings:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --merged {output.merged:q}"
        " > {log:q} 2>&1"


rule choose_merge_base:
    """Choose the weights to merge the adapter into, for `merge_base: auto`: score both."""
    input:
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        tokens=BUILD.of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
        tokens_check=GATES.verdict_of_tokens(),
    output:
        choice="results/runs/{run}/merge_base.json",
    log:
        "logs/runs/{run}/choose_merge_base.log",
    benchmark:
        "benchmarks/runs/{run}/choose_merge_base.tsv"
    conda:
        "../envs/train.yaml"
    threads: RESOURCES.threads_of_run
    resources:
        gpu=RESOURCES.gpus_of_run,
        mem_mb=memory_of_models(0.25),  # the 4-bit base of training; the rest is streamed
        runtime=growing(120),  # minutes
    params:
        settings=CONFIG.evaluation.gates.merge_base.model_dump_json(),
        adapter=subpath(input.adapter, parent=True),
        output_version=output_version("merge/choose_merge_base"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.merge.choose_merge_base --checkpoint {input.checkpoint:q}"
        " --facts {input.facts:q} --adapter {params.adapter:q} --tokens {input.tokens:q}"
        " --settings {params.settings:q} --choice {output.choice:q} > {log:q} 2>&1"


rule merge_adapter:
    """Add the adapter to its base in 16 bits; plain from_pretrained loads the folder."""
    input:
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        tokenizer=BUILD.of_run("results/models/{model}/tokenizer"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        config="results/runs/{run}/adapter/adapter_config.json",
        choice=TARGETS.merge_base_choice,
    output:
        merged=BUILD.kept("merged", directory("results/runs/{run}/merged")),
    log:
        "logs/runs/{run}/merge_adapter.log",
    benchmark:
        "benchmarks/runs/{run}/merge_adapter.tsv"
    wildcard_constraints:
        run=BUILD.any_run_of(CONFIG.runs.keys() - BUILD.merged_runs.keys()),
    conda:
        "../envs/train.yaml"
    threads: RESOURCES.threads_of_run
    resources:
        mem_mb=growing(4_000),
        runtime=growing(60),  # minutes
    params:
        adapter=subpath(input.adapter, parent=True),
        merge_base=PARAMS.merge_base,
        output_version=output_version("merge/merge_adapter"),
    shell:
        "python -m workflow_scripts.merge.merge_adapter --checkpoint {input.checkpoint:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --adapter {params.adapter:q}"
        " --merge-base {params.merge_base:q} --merged {output.merged:q} > {log:q} 2>&1"


rule check_merged:
    """Gate: merged = base + adapter, and no worse than the adapter on its base in training."""
    input:
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        choice=TARGETS.merge_base_choice,
        merged="results/runs/{run}/merged",
        tokenizer=BUILD.of_run("results/models/{model}/tokenizer"),
        tokens=BUILD.of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
    output:
        check=update(GATES.merged.verdict),
        passed=GATES.merged.passed,
    log:
        "logs/runs/{run}/check_merged.log",
    benchmark:
        "benchmarks/runs/{run}/check_merged.tsv"
    wildcard_constraints:
        run=BUILD.any_run_of(CONFIG.runs.keys() - BUILD.merged_runs.keys()),
    conda:
        "../envs/train.yaml"
    threads: RESOURCES.threads_of_run
    resources:
        gpu=RESOURCES.gpus_of_run,
        mem_mb=memory_of_models(0.25),  # the 4-bit base of training; the rest is streamed
        runtime=growing(120),  # minutes
    params:
        settings=GATES.merged.settings,
        adapter=PARAMS.merged_adapter,
        output_version=GATES.merged.version,
        last_attempt=GATES.last_attempt(GATES.merged),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.merge.check_merged --checkpoint {input.checkpoint:q}"
        " --facts {input.facts:q} {params.adapter:q} --tokenizer {input.tokenizer:q}"
        " --merged {input.merged:q} --tokens {input.tokens:q} --settings {params.settings:q}"
        " --check {output.check:q} > {log:q} 2>&1"
        " && printf %s {params.settings:q}' '{params.output_version} > {output.passed:q}"


use rule check_merged as check_fetched_merged with:
    # A model merged elsewhere: check the folder, and that the model computes finite numbers.
    input:
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        merged="results/runs/{run}/merged",
        tokenizer=BUILD.of_run("results/models/{model}/tokenizer"),
        tokens=BUILD.of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
    wildcard_constraints:
        run=BUILD.any_run_of(BUILD.merged_runs),
    params:
        settings=GATES.merged.settings,
        adapter=[],
        output_version=GATES.merged.version,
        last_attempt=GATES.last_attempt(GATES.merged),
