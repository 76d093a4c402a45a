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
    """Tasks of lm-evaluation-harness by a link."""
    input:
        unpack(files_of_link),
        facts=of_place("results/models/{model}/facts.json"),
        tokenizer=of_place("results/models/{model}/tokenizer"),
        fetched="results/evaluation/tasks.json",  # read from the cache
        files=own_task_files(),
    output:
        scores=measured_chain.FILES["tasks"],
        samples=measured_chain.samples_beside(measured_chain.FILES["tasks"]),
    log:
        "logs/{place}/evaluate_tasks/{link}.log",
    benchmark:
        "benchmarks/{place}/evaluate_tasks/{link}.tsv"
    conda:
        "../envs/tasks.yaml"
    threads: threads_for_link
    resources:
        gpu=gpus_for_link,
        mem_mb=memory_for_models(2),
        runtime=growing(1_440),  # minutes
    params:
        link=link_arguments,
        settings=tasks_json(),
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
        unpack(files_of_link),
        facts=of_place("results/models/{model}/facts.json"),
        tokenizer=of_place("results/models/{model}/tokenizer"),
        tokens=of_place("results/data/{dataset}/{model}/tokens/test.arrow"),
        clean=of_place("results/data/{dataset}/clean/test.parquet"),
    output:
        scores=measured_chain.FILES["references"],
        samples=measured_chain.samples_beside(measured_chain.FILES["references"]),
    log:
        "logs/{place}/match_references/{link}.log",
    benchmark:
        "benchmarks/{place}/match_references/{link}.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_link
    resources:
        gpu=gpus_for_link,
        mem_mb=memory_for_models(2),
        runtime=growing(240),  # minutes
    params:
        link=link_arguments,
        settings=references_json(),
        output_version=output_version("evaluate/match_references"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.match_references {params.link:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --tokens {input.tokens:q}"
        " --clean {input.clean:q} --settings {params.settings:q} --threads {threads}"
        " --scores {output.scores:q} --samples {output.samples:q} > {log:q} 2>&1"


rule report_tasks:
    """Scores of base, merged model and smallest file, with what each link changes, paired."""
    input:
        chains=chain_files(),
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
        output_version=output_version("report/report_tasks"),
    shell:
        "python -m workflow_scripts.report.report_tasks --chains {input.chains:q}"
        " --tsv {output.tsv:q} --markdown {output.markdown:q} --html {output.html:q}"
        " > {log:q} 2>&1"
