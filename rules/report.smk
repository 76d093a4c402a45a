rule preview_chats:
    """Write a page of conversations as the model will see them: tokens, supervision, ends of rows."""
    input:
        chats="results/data/{dataset}/clean/train.parquet",
        tokens="results/data/{dataset}/{model}/tokens/train.arrow",
        tokenizer="results/models/{model}/tokenizer",
        plan="results/data/{dataset}/{model}/{packing}/plan.parquet",
    output:
        preview=report(
            "results/data/{dataset}/{model}/{packing}/preview.html",
            category="Data",
            labels={
                "what": "conversations as tokens",
                "dataset": "{dataset}",
                "model": "{model}",
                "packing": "{packing}",
            },
            caption="../workflow_scripts/report/captions/preview.rst",
        ),
    log:
        "logs/data/{dataset}/{model}/{packing}/preview_chats.log",
    benchmark:
        "benchmarks/data/{dataset}/{model}/{packing}/preview_chats.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(10),  # minutes
    params:
        settings=lambda wildcards: PARAMS.entry("datasets", wildcards.dataset, "preview"),
        output_version=output_version("report/preview_chats"),
    shell:
        "python -m workflow_scripts.report.preview_chats --clean {input.chats:q}"
        " --tokens {input.tokens:q} --tokenizer {input.tokenizer:q} --plan {input.plan:q}"
        " --settings {params.settings:q} --preview {output.preview:q} > {log:q} 2>&1"


rule report_tasks:
    """Tabulate the task scores of base, merged model and smallest file, with paired changes."""
    input:
        chains=TARGETS.chains(),
        scores=TARGETS.task_scores(),
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
        asked=LINKS.task_arguments(),
        output_version=output_version("report/report_tasks"),
    shell:
        "python -m workflow_scripts.report.report_tasks --chains {input.chains:q}"
        " {params.asked:q} --tsv {output.tsv:q} --markdown {output.markdown:q} --html {output.html:q}"
        " > {log:q} 2>&1"


rule report_cleaning:
    """Write a page on a dataset: what was kept, what was rejected and why, with samples."""
    input:
        report="results/data/{dataset}/clean/cleaning_report.json",
        rejected="results/data/{dataset}/clean/rejected.parquet",
    output:
        page=report(
            "results/data/{dataset}/clean/cleaning_report.html",
            category="Data",
            labels={"what": "cleaning", "dataset": "{dataset}", "model": "", "packing": ""},
            caption="../workflow_scripts/report/captions/cleaning.rst",
        ),
    log:
        "logs/data/{dataset}/report_cleaning.log",
    benchmark:
        "benchmarks/data/{dataset}/report_cleaning.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(10),  # minutes
    params:
        output_version=output_version("report/report_cleaning"),
    shell:
        "python -m workflow_scripts.report.report_cleaning --report {input.report:q}"
        " --rejected {input.rejected:q} --page {output.page:q} > {log:q} 2>&1"


rule report_packing:
    """Write a page on a packing plan: rows, their cost, and what attention sees in a few of them."""
    input:
        plan="results/data/{dataset}/{model}/{packing}/plan.parquet",
        report="results/data/{dataset}/{model}/{packing}/packing_report.json",
        tokens="results/data/{dataset}/{model}/tokens/train.arrow",
        facts="results/models/{model}/facts.json",
    output:
        page=report(
            "results/data/{dataset}/{model}/{packing}/packing.html",
            category="Data",
            labels={
                "what": "packing",
                "dataset": "{dataset}",
                "model": "{model}",
                "packing": "{packing}",
            },
            caption="../workflow_scripts/report/captions/packing.rst",
        ),
    log:
        "logs/data/{dataset}/{model}/{packing}/report_packing.log",
    benchmark:
        "benchmarks/data/{dataset}/{model}/{packing}/report_packing.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(10),  # minutes
    params:
        output_version=output_version("report/report_packing"),
    shell:
        "python -m workflow_scripts.report.report_packing --plan {input.plan:q}"
        " --report {input.report:q} --tokens {input.tokens:q} --facts {input.facts:q}"
        " --page {output.page:q} > {log:q} 2>&1"


rule write_chain:
    """Write the paths of a run's measurements, for the programs that report them."""
    output:
        chain="results/runs/{run}/chain.json",
    log:
        "logs/runs/{run}/write_chain.log",
    benchmark:
        "benchmarks/report/write_chain/{run}.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        settings=lambda wildcards: LINKS.chain_settings(wildcards.run).model_dump_json(),
        output_version=output_version("report/write_chain"),
    shell:
        "python -m workflow_scripts.report.write_chain --run {wildcards.run:q}"
        " --settings {params.settings:q} --chain {output.chain:q} > {log:q} 2>&1"


rule collect_metrics:
    """Collect every figure of a run with its unit, error and source file."""
    input:
        chain="results/runs/{run}/chain.json",
        scores=lambda wildcards: TARGETS.evaluations([wildcards.run]),
        texts=lambda wildcards: TARGETS.text_scores([wildcards.run]),
        token_scores=lambda wildcards: TARGETS.token_scores([wildcards.run]),
        checks=ancient([GATES.merged.verdict, GATES.gguf.verdict]),
        training=lambda wildcards: TARGETS.training_reports(wildcards.run),
        merge_base=TARGETS.merge_base_choice,
        facts=BUILD.of_run("results/models/{model}/facts.json"),
    output:
        metrics="results/runs/{run}/metrics.json",
    log:
        "logs/runs/{run}/collect_metrics.log",
    benchmark:
        "benchmarks/report/collect_metrics/{run}.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        also=LINKS.also_measured(),
        gates=GATES.samples(),
        output_version=output_version("report/collect_metrics"),
    shell:
        "python -m workflow_scripts.report.collect_metrics --chains {input.chain:q}"
        " {params.also:q} --metrics {output.metrics:q} > {log:q} 2>&1"


# Reports of all runs read every score of each run. Their input is only metrics.json, which is made
# from the scores and contains their hashes: each further input file slows every start of Snakemake.
rule report_comparison:
    """Tabulate the runs side by side: perplexity, speed, memory and context."""
    input:
        chains=TARGETS.chains(),
        metrics=TARGETS.metrics(),
    output:
        tsv="results/report/comparison.tsv",
        markdown="results/report/comparison.md",
        html=report(
            "results/report/comparison.html",
            caption="../workflow_scripts/report/captions/comparison.rst",
            category="Comparison",
        ),
    log:
        "logs/report/report_comparison.log",
    benchmark:
        "benchmarks/report/report_comparison.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        also=LINKS.also_measured(),
        output_version=output_version("report/report_comparison"),
    shell:
        "python -m workflow_scripts.report.report_comparison --chains {input.chains:q}"
        " {params.also:q} --tsv {output.tsv:q} --markdown {output.markdown:q}"
        " --html {output.html:q} > {log:q} 2>&1"


rule report_chain:
    """Tabulate and draw the perplexity of every link from base to quantized file."""
    input:
        chains=TARGETS.chains(),
        metrics=TARGETS.metrics(),
    output:
        tsv="results/report/chain.tsv",
        markdown="results/report/chain.md",
        html=report(
            "results/report/chain.html",
            caption="../workflow_scripts/report/captions/chain.rst",
            category="Chain of perplexities",
        ),
        figure=report(
            "results/report/chain.svg",
            caption="../workflow_scripts/report/captions/chain.rst",
            category="Chain of perplexities",
        ),
    log:
        "logs/report/report_chain.log",
    benchmark:
        "benchmarks/report/report_chain.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        also=LINKS.also_measured(),
        n_conversations=CONFIG.evaluation.max_conversations or "all",
        output_version=output_version("report/report_chain"),
    shell:
        "python -m workflow_scripts.report.report_chain --chains {input.chains:q}"
        " {params.also:q} --tsv {output.tsv:q} --markdown {output.markdown:q}"
        " --html {output.html:q} --figure {output.figure:q} > {log:q} 2>&1"


rule report_loss:
    """Draw the training loss, with the validation loss on the same axes."""
    input:
        histories=expand(
            "results/runs/{run}/adapter/history.json", run=TARGETS.built_trained_runs()
        ),
    output:
        figure=report(
            "results/report/loss.svg",
            caption="../workflow_scripts/report/captions/loss.rst",
            category="Training",
        ),
    log:
        "logs/report/report_loss.log",
    benchmark:
        "benchmarks/report/report_loss.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        output_version=output_version("report/report_loss"),
    shell:
        "python -m workflow_scripts.report.report_loss --histories {input.histories:q}"
        " --figure {output.figure:q} > {log:q} 2>&1"


rule report_overview:
    """Write the first page: the runs side by side, their differences in words, answers to read."""
    input:
        chains=TARGETS.chains(),
        metrics=TARGETS.metrics(),
        answers=TARGETS.overview_answers(),
    output:
        page=report(
            "results/report/overview.html",
            caption="../workflow_scripts/report/captions/overview.rst",
            category="Overview",
        ),
        headline="results/report/headline.md",
    log:
        "logs/report/report_overview.log",
    benchmark:
        "benchmarks/report/report_overview.tsv"
    localrule: True
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=growing(2_000),
        runtime=growing(10),  # minutes
    params:
        also=LINKS.also_measured(),
        samples=[*flagged("--sampled", TARGETS.sampled_runs()), "--samples", *LINKS.sample_links],
        output_version=output_version("report/report_overview"),
    shell:
        "python -m workflow_scripts.report.report_overview --chains {input.chains:q}"
        " {params.also:q} {params.samples:q} --page {output.page:q}"
        " --headline {output.headline:q} > {log:q} 2>&1"


rule report_run:
    """Write the page of a run: all its figures, drawn and in tables."""
    input:
        chain="results/runs/{run}/chain.json",
        scores=lambda wildcards: TARGETS.evaluations([wildcards.run]),
        token_scores=lambda wildcards: TARGETS.token_scores([wildcards.run]),
        texts=lambda wildcards: TARGETS.text_scores([wildcards.run]),
        checks=ancient([GATES.merged.verdict, GATES.gguf.verdict]),
        data=lambda wildcards: TARGETS.data_reports(wildcards.run),
        training=lambda wildcards: TARGETS.training_files(wildcards.run),
        facts=BUILD.of_run("results/models/{model}/facts.json"),
    output:
        page=report(
            "results/runs/{run}/report.html",
            caption="../workflow_scripts/report/captions/run.rst",
            category="Runs",
            labels={"run": "{run}"},
        ),
    log:
        "logs/runs/{run}/report_run.log",
    benchmark:
        "benchmarks/report/report_run/{run}.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        also=LINKS.also_measured(),
        benchmarks="benchmarks/runs/{run}",
        gates=GATES.samples(),
        output_version=output_version("report/report_run"),
    shell:
        "python -m workflow_scripts.report.report_run --chains {input.chain:q}"
        " {params.also:q} --benchmarks {params.benchmarks:q} --page {output.page:q} > {log:q} 2>&1"


rule tabulate_metrics:
    """Write the figures of all runs to one table."""
    input:
        metrics=TARGETS.metrics(),
    output:
        table="results/report/all_metrics.parquet",
    log:
        "logs/report/tabulate_metrics.log",
    benchmark:
        "benchmarks/report/tabulate_metrics.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        output_version=output_version("report/tabulate_metrics"),
    shell:
        "python -m workflow_scripts.report.tabulate_metrics --metrics {input.metrics:q}"
        " --table {output.table:q} > {log:q} 2>&1"


rule report_context:
    """Tabulate the usable context of base, merged model and smallest file, with heat maps."""
    input:
        chains=TARGETS.chains(),
        scores=TARGETS.contexts(),
    output:
        tsv="results/report/context.tsv",
        markdown="results/report/context.md",
        html=report(
            "results/report/context.html",
            caption="../workflow_scripts/report/captions/context.rst",
            category="Usable context",
        ),
    log:
        "logs/report/report_context.log",
    benchmark:
        "benchmarks/report/report_context.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        asked=LINKS.context_arguments(),
        output_version=output_version("report/report_context"),
    shell:
        "python -m workflow_scripts.report.report_context --chains {input.chains:q}"
        " {params.asked:q} --tsv {output.tsv:q}"
        " --markdown {output.markdown:q} --html {output.html:q} > {log:q} 2>&1"


rule report_samples:
    """Write a page with the answers of every link to the same prompts."""
    input:
        chains=TARGETS.chains(),
        answers=TARGETS.answers(),
    output:
        page=report(
            "results/report/samples.html",
            caption="../workflow_scripts/report/captions/samples.rst",
            category="Answers",
        ),
    log:
        "logs/report/report_samples.log",
    benchmark:
        "benchmarks/report/report_samples.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        output_version=output_version("report/report_samples"),
    shell:
        "python -m workflow_scripts.report.report_samples --chains {input.chains:q}"
        " --page {output.page:q} > {log:q} 2>&1"


rule report_experiment:
    """Compare the runs in `build`, grouped by the settings in which they differ, over seeds."""
    input:
        positions=expand(
            "results/runs/{run}/evaluation/positions.json", run=TARGETS.built_trained_runs()
        ),
        recall=expand(
            "results/runs/{run}/evaluation/recall.json",
            run=TARGETS.built_trained_runs() if CONFIG.evaluation.recall.n_prompts else [],
        ),
    output:
        tsv="results/report/experiment.tsv",
        markdown="results/report/experiment.md",
        html=report(
            "results/report/experiment.html",
            caption="../workflow_scripts/report/captions/experiment.rst",
            category="Experiment",
        ),
        figure=report(
            "results/report/experiment.svg",
            caption="../workflow_scripts/report/captions/experiment.rst",
            category="Experiment",
        ),
    log:
        "logs/report/report_experiment.log",
    benchmark:
        "benchmarks/report/report_experiment.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        runs=PARAMS.experiment(),
        recall=lambda wildcards, input: flagged("--recall", input.recall),
        n_prompts=CONFIG.evaluation.recall.n_prompts,  # in the caption
        output_version=output_version("report/report_experiment"),
    shell:
        "python -m workflow_scripts.report.report_experiment --runs {params.runs:q}"
        " --positions {input.positions:q} {params.recall:q} --tsv {output.tsv:q} --markdown {output.markdown:q}"
        " --html {output.html:q} --figure {output.figure:q} > {log:q} 2>&1"


rule report_sweep:
    """Rank the runs of every sweep by validation scores, to find the best values of a recipe."""
    input:
        scores=expand("results/runs/{run}/evaluation/validation.json", run=BUILD.sweep_runs),
        token_scores=expand(
            "results/runs/{run}/evaluation/validation.tokens.parquet", run=BUILD.sweep_runs
        ),
        manifests=expand("results/runs/{run}/adapter/training_manifest.json", run=BUILD.sweep_runs),
    output:
        tsv="results/report/sweep.tsv",
        markdown="results/report/sweep.md",
        html=report(
            "results/report/sweep.html",
            caption="../workflow_scripts/report/captions/sweep.rst",
            category="Sweep",
        ),
        figure=report(
            "results/report/sweep.svg",
            caption="../workflow_scripts/report/captions/sweep.rst",
            category="Sweep",
        ),
    log:
        "logs/report/report_sweep.log",
    benchmark:
        "benchmarks/report/report_sweep.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(10),  # minutes
    params:
        sweeps=PARAMS.sweeps(),
        output_version=output_version("report/report_sweep"),
    shell:
        "python -m workflow_scripts.report.report_sweep --sweeps {params.sweeps:q}"
        " --scores {input.scores:q} --manifests {input.manifests:q} --tsv {output.tsv:q} --markdown {output.markdown:q}"
        " --html {output.html:q} --figure {output.figure:q} > {log:q} 2>&1"
