rule fetch_tasks:
    """The data of the tasks, from the Hub into the cache of `datasets`, where there is a connection."""
    input:
        files=own_task_files(),
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
        settings=CONFIG.evaluation.tasks.model_dump_json(include={"names", "include"}),
        output_version=output_version("evaluate/fetch_tasks"),
    shell:
        "python -m workflow_scripts.evaluate.fetch_tasks --settings {params.settings:q}"
        " --fetched {output.fetched:q} > {log:q} 2>&1"


rule evaluate_tasks:
    """Tasks of lm-evaluation-harness by a GGUF, through llama.cpp in the same process."""
    input:
        gguf="results/runs/{run}/gguf/{run}-{gguf}.gguf",
        gguf_check=ancient(GGUF_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        fetched="results/evaluation/tasks.json",  # read from the cache
        files=own_task_files(),
    output:
        scores="results/runs/{run}/evaluation/{gguf}.tasks.json",
        samples="results/runs/{run}/evaluation/{gguf}.tasks.parquet",
    log:
        "logs/runs/{run}/evaluate_tasks/{gguf}.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_tasks/{gguf}.tsv"
    conda:
        "../envs/tasks.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=memory_for_models(2),
        runtime=growing(1_440),  # minutes
    params:
        link=lambda wildcards, input: ["--gguf", input.gguf],
        settings=tasks_json(),
        output_version=output_version("evaluate/evaluate_tasks"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.evaluate_tasks {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --settings {params.settings:q}"
        " --threads {threads} --scores {output.scores:q} --samples {output.samples:q}"
        " > {log:q} 2>&1"


use rule evaluate_tasks as evaluate_tasks_merged with:
    input:
        checkpoint="results/runs/{run}/merged",
        merged_check=ancient(MERGED_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        fetched="results/evaluation/tasks.json",
        files=own_task_files(),
    output:
        scores="results/runs/{run}/evaluation/merged.tasks.json",
        samples="results/runs/{run}/evaluation/merged.tasks.parquet",
    log:
        "logs/runs/{run}/evaluate_tasks/merged.log",
    benchmark:
        "benchmarks/runs/{run}/evaluate_tasks/merged.tsv"
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings=tasks_json(),
        output_version=output_version("evaluate/evaluate_tasks"),


use rule evaluate_tasks as evaluate_tasks_base with:
    input:
        checkpoint="results/models/{model}/checkpoint",
        facts="results/models/{model}/facts.json",
        tokenizer="results/models/{model}/tokenizer",
        fetched="results/evaluation/tasks.json",
        files=own_task_files(),
    output:
        scores="results/evaluation/{model}/base.tasks.json",
        samples="results/evaluation/{model}/base.tasks.parquet",
    log:
        "logs/evaluation/{model}/evaluate_tasks.log",
    benchmark:
        "benchmarks/evaluation/{model}/evaluate_tasks.tsv"
    threads: threads_for_model
    resources:
        gpu=gpus_for_model,
        mem_mb=memory_for_models(2),
        runtime=growing(1_440),  # minutes
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings=tasks_json(),
        output_version=output_version("evaluate/evaluate_tasks"),


rule match_references:
    """Exact match of a GGUF's answers with the reference answers of the test split."""
    input:
        gguf="results/runs/{run}/gguf/{run}-{gguf}.gguf",
        gguf_check=ancient(GGUF_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=of_run("results/data/{dataset}/clean/test.parquet"),
    output:
        scores="results/runs/{run}/evaluation/{gguf}.references.json",
        samples="results/runs/{run}/evaluation/{gguf}.references.parquet",
    log:
        "logs/runs/{run}/match_references/{gguf}.log",
    benchmark:
        "benchmarks/runs/{run}/match_references/{gguf}.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=memory_for_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: ["--gguf", input.gguf],
        settings=references_json(),
        output_version=output_version("evaluate/match_references"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.match_references {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --tokens {input.tokens:q}"
        " --clean {input.clean:q} --settings {params.settings:q} --threads {threads}"
        " --scores {output.scores:q} --samples {output.samples:q} > {log:q} 2>&1"


use rule match_references as match_references_merged with:
    input:
        checkpoint="results/runs/{run}/merged",
        merged_check=ancient(MERGED_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=of_run("results/data/{dataset}/clean/test.parquet"),
    output:
        scores="results/runs/{run}/evaluation/merged.references.json",
        samples="results/runs/{run}/evaluation/merged.references.parquet",
    log:
        "logs/runs/{run}/match_references/merged.log",
    benchmark:
        "benchmarks/runs/{run}/match_references/merged.tsv"
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings=references_json(),
        output_version=output_version("evaluate/match_references"),


use rule match_references as match_references_base with:
    input:
        checkpoint="results/models/{model}/checkpoint",
        facts="results/models/{model}/facts.json",
        tokenizer="results/models/{model}/tokenizer",
        tokens="results/data/{dataset}/{model}/tokens/test.arrow",
        clean="results/data/{dataset}/clean/test.parquet",
    output:
        scores="results/evaluation/{model}/{dataset}/base.references.json",
        samples="results/evaluation/{model}/{dataset}/base.references.parquet",
    log:
        "logs/evaluation/{model}/{dataset}/match_references.log",
    benchmark:
        "benchmarks/evaluation/{model}/{dataset}/match_references.tsv"
    threads: threads_for_model
    resources:
        gpu=gpus_for_model,
        mem_mb=memory_for_models(2),
        runtime=growing(240),  # minutes
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings=references_json(),
        output_version=output_version("evaluate/match_references"),


rule report_tasks:
    """Scores of base, merged model and smallest file, with what each link changes, paired."""
    input:
        scores=task_files(),
    output:
        tsv="results/report/tasks.tsv",
        markdown="results/report/tasks.md",
        html=report(
            "results/report/tasks.html",
            caption="../workflow_scripts/report/captions/tasks.rst",
            category="Tasks",
        ),
    log:
        "logs/report/report_tasks.log",
    benchmark:
        "benchmarks/report/report_tasks.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(10),  # minutes
    params:
        runs=runs_json(),
        links=TASK_LINKS,
        kinds=task_kinds(),
        output_version=output_version("report/report_tasks"),
    shell:
        "python -m workflow_scripts.report.report_tasks --runs {params.runs:q}"
        " --links {params.links:q} --kinds {params.kinds:q} --results results"
        " --tsv {output.tsv:q} --markdown {output.markdown:q} --html {output.html:q}"
        " > {log:q} 2>&1"
