rule benchmark_inference:
    """Speed, memory and size of a link, alone on the machine: it takes all cores."""
    input:
        unpack(files_of_link),
        facts=of_place("results/models/{model}/facts.json"),
    output:
        speed=measured_chain.FILES["speed"],
    log:
        "logs/{place}/benchmark_inference/{link}.log",
    benchmark:
        "benchmarks/{place}/benchmark_inference/{link}.tsv"
    conda:
        "../envs/export.yaml"
    threads: all_cores()
    resources:
        gpu=gpus_for_scoring,
        mem_mb=memory_for_scoring,
        runtime=growing(60),  # minutes
    params:
        link=link_arguments,
        settings=CONFIG.evaluation.inference.model_dump_json(),
        output_version=output_version("evaluate/benchmark_inference"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.evaluate.benchmark_inference {params.link:q}"
        " --facts {input.facts:q} --settings {params.settings:q} --threads {threads}"
        " --speed {output.speed:q} > {log:q} 2>&1"
