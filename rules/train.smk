rule train_adapter:
    """QLoRA over the rows of the plan; resumes from its own checkpoints, which are no output."""
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        facts=of_run("results/models/{model}/facts.json"),
        train=of_run("results/data/{dataset}/{model}/tokens/train.arrow"),
        validation=of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
        plan=of_run("results/data/{dataset}/{model}/{packing}/plan.parquet"),
    output:
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        config="results/runs/{run}/adapter/adapter_config.json",
        history="results/runs/{run}/adapter/history.json",
        manifest="results/runs/{run}/adapter/training_manifest.json",
    log:
        "logs/runs/{run}/train_adapter.log",
    benchmark:
        "benchmarks/runs/{run}/train_adapter.tsv"
    conda:
        "../envs/train.yaml"
    threads: 8
    resources:
        gpu=gpus_for_run,
        mem_mb=lambda wildcards, attempt: 16_000 * attempt,
        runtime=1440,  # minutes
    params:
        settings=lambda wildcards: settings_json("recipes", CONFIG.runs[wildcards.run].recipe),
        tokens=subpath(input.train, parent=True),
        adapter=subpath(output.adapter, parent=True),
        output_version=output_version("train/train_adapter"),
    shell:
        "python -m workflow_scripts.train.train_adapter --checkpoint {input.checkpoint:q}"
        " --facts {input.facts:q} --tokens {params.tokens:q} --plan {input.plan:q}"
        " --settings {params.settings:q} --resume-from checkpoints/{wildcards.run:q}"
        " --adapter {params.adapter:q} > {log:q} 2>&1"
