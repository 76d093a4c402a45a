rule check_recipe:
    """Gate: ranks and targets of a recipe fit a model. Runs as soon as the facts are known, to stop a
    build early. It is not an input of other rules, as its changes would start training again."""
    input:
        facts="results/models/{model}/facts.json",
    output:
        check="results/models/{model}/recipes/{recipe}_check.json",
    log:
        "logs/models/{model}/check_recipe/{recipe}.log",
    wildcard_constraints:
        recipe=any_of(CONFIG.recipes),
    priority: 100
    localrule: True
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=growing(500),
        runtime=growing(5),  # minutes
    params:
        recipe=lambda wildcards: PARAMS.entry("recipes", wildcards.recipe),
        output_version=output_version("train/check_recipe"),
    shell:
        "python -m workflow_scripts.train.check_recipe --facts {input.facts:q}"
        " --recipe {params.recipe:q} --name {wildcards.recipe:q} --check {output.check:q}"
        " > {log:q} 2>&1"


rule plan_memory:
    """Gate: training fits into the GPU's memory; else the error names the nearest settings that do."""
    input:
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        plan=BUILD.of_run("results/data/{dataset}/{model}/{packing}/plan.parquet"),
    output:
        memory_plan="results/runs/{run}/memory_plan.json",
    log:
        "logs/runs/{run}/plan_memory.log",
    benchmark:
        "benchmarks/runs/{run}/plan_memory.tsv"
    wildcard_constraints:
        run=BUILD.any_run_of(BUILD.trained_runs),
    conda:
        "../envs/train.yaml"
    resources:
        gpu=RESOURCES.gpus_of_a_node,  # the other nodes of training have the same
        mem_mb=growing(4_000),
        runtime=growing(10),  # minutes
    params:
        recipe=PARAMS.recipe,
        # Derived from the resources: a change of it does not make Snakemake run anything again.
        training=lambda wildcards, resources: PARAMS.training(resources),
        output_version=output_version("train/plan_memory"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.train.plan_memory --facts {input.facts:q}"
        " --plan {input.plan:q} --recipe {params.recipe:q} --training {params.training:q}"
        " --memory-plan {output.memory_plan:q} > {log:q} 2>&1"


rule train_adapter:
    """Train an adapter on the rows of the plan. Resumes from its checkpoints, which are not outputs."""
    input:
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        train=BUILD.of_run("results/data/{dataset}/{model}/tokens/train.arrow"),
        validation=BUILD.of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
        plan=BUILD.of_run("results/data/{dataset}/{model}/{packing}/plan.parquet"),
        memory_plan="results/runs/{run}/memory_plan.json",  # gate, not read
    output:
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        config="results/runs/{run}/adapter/adapter_config.json",
        history="results/runs/{run}/adapter/history.json",
        manifest="results/runs/{run}/adapter/training_manifest.json",
    log:
        "logs/runs/{run}/train_adapter.log",
    benchmark:
        "benchmarks/runs/{run}/train_adapter.tsv"
    wildcard_constraints:
        run=BUILD.any_run_of(BUILD.trained_runs),
    conda:
        "../envs/train.yaml"
    threads: RESOURCES.threads_of_training
    resources:
        **RESOURCES.several_nodes(),
        gpu=RESOURCES.gpus_of_training,
        nodes=CONFIG.training.nodes,
        mem_mb=memory_of_models(CONFIG.training.gpus),  # per node, with one process per GPU
        runtime=1440,  # minutes; the next attempt continues from the checkpoints
    params:
        settings=PARAMS.recipe,
        # As above.
        training=lambda wildcards, resources: PARAMS.training(resources, CONFIG.training.nodes),
        tokens=subpath(input.train, parent=True),
        adapter=subpath(output.adapter, parent=True),
        output_version=output_version("train/train_adapter"),
    shell:
        # exec: a shell in between would be killed by the TERM on which training saves its state.
        "exec python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.train.train_adapter --checkpoint {input.checkpoint:q}"
        " --facts {input.facts:q} --tokens {params.tokens:q} --plan {input.plan:q}"
        " --settings {params.settings:q} --training {params.training:q}"
        " --resume-from checkpoints/{wildcards.run:q}"
        " --curves logs/runs/{wildcards.run:q}/tensorboard"
        " --adapter {params.adapter:q} > {log:q} 2>&1"
