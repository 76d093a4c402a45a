rule benchmark_inference:
    """Speed, memory and size of a GGUF, alone on the machine: it takes all cores."""
    input:
        gguf="results/runs/{run}/gguf/{run}-{gguf}.gguf",
        gguf_check=ancient(GGUF_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
    output:
        speed="results/runs/{run}/evaluation/{gguf}.inference.json",
    log:
        "logs/runs/{run}/benchmark_inference/{gguf}.log",
    benchmark:
        "benchmarks/runs/{run}/benchmark_inference/{gguf}.tsv"
    conda:
        "../envs/export.yaml"
    threads: all_cores()
    resources:
        gpu=0,  # llama.cpp as it is installed here
        mem_mb=memory_for_models(1.1),
        runtime=growing(60),  # minutes
    params:
        link=lambda wildcards, input: ["--gguf", input.gguf],
        settings=CONFIG.evaluation.inference.model_dump_json(),
        output_version=output_version("evaluate/benchmark_inference"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.benchmark_inference {params.link:q}"
        " --facts {input.facts:q} --settings {params.settings:q} --threads {threads}"
        " --speed {output.speed:q} > {log:q} 2>&1"


use rule benchmark_inference as benchmark_inference_merged with:
    input:
        checkpoint="results/runs/{run}/merged",
        merged_check=ancient(MERGED_GATE.verdict),  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
    output:
        speed="results/runs/{run}/evaluation/merged.inference.json",
    log:
        "logs/runs/{run}/benchmark_inference/merged.log",
    benchmark:
        "benchmarks/runs/{run}/benchmark_inference/merged.tsv"
    resources:
        gpu=gpus_for_run,
        mem_mb=memory_for_models(2),
        runtime=growing(60),  # minutes
    params:
        link=lambda wildcards, input: ["--checkpoint", input.checkpoint],
        settings=CONFIG.evaluation.inference.model_dump_json(),
        output_version=output_version("evaluate/benchmark_inference"),


use rule benchmark_inference_merged as benchmark_inference_adapter with:
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        facts=of_run("results/models/{model}/facts.json"),
    output:
        speed="results/runs/{run}/evaluation/adapter.inference.json",
    log:
        "logs/runs/{run}/benchmark_inference/adapter.log",
    benchmark:
        "benchmarks/runs/{run}/benchmark_inference/adapter.tsv"
    params:
        link=lambda wildcards, input: live_adapter(wildcards, input),
        settings=CONFIG.evaluation.inference.model_dump_json(),
        output_version=output_version("evaluate/benchmark_inference"),
