rule plan_quantizations:
    """Plan the types of a model's tensors early, so that a warning about fallbacks comes before
    training. Warnings go to the console too."""
    input:
        facts="results/models/{model}/facts.json",
    output:
        plan="results/models/{model}/quantization_plan.json",
    log:
        "logs/models/{model}/plan_quantizations.log",
    priority: 100
    localrule: True
    conda:
        "../envs/export.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(5),  # minutes
    params:
        settings=PARAMS.quantizations(),
        output_version=output_version("quantize/plan_quantizations"),
    shell:
        "python -m workflow_scripts.quantize.plan_quantizations --facts {input.facts:q}"
        " --model {wildcards.model:q} --settings {params.settings:q} --plan {output.plan:q}"
        " > {log:q} 2>&1; grep -h ' WARNING ' {log:q} >&2 || true"


rule convert_gguf_base:
    """Convert a base to an F16 GGUF with llama.cpp's own converter."""
    input:
        merged="results/models/{model}/checkpoint",
        tokenizer="results/models/{model}/tokenizer",
        facts="results/models/{model}/facts.json",
    output:
        gguf="results/models/{model}/gguf/{model}-F16.gguf",
    log:
        "logs/models/{model}/convert_gguf.log",
    cache: BUILD.is_shared
    conda:
        "../envs/export.yaml"
    threads: RESOURCES.threads_of_model
    resources:
        mem_mb=growing(8_000),
        runtime=growing(60),  # minutes
    params:
        name=lambda wildcards: wildcards.model,
        tokenizer=lambda wildcards, input: ["--tokenizer", input.tokenizer],
        published="{}",
        software=PARAMS.versions_of("llama-cpp-python", "transformers", "mistral-common"),
        output_version=output_version("quantize/convert_gguf"),
    shell:
        "python -m workflow_scripts.quantize.convert_gguf --merged {input.merged:q}"
        " {params.tokenizer:q} --facts {input.facts:q} --name {params.name:q}"
        " --published {params.published:q} --gguf {output.gguf:q} > {log:q} 2>&1"


use rule convert_gguf_base as convert_gguf with:
    # Not in the shared cache: its key would not distinguish two trainings of one recipe.
    input:
        merged="results/runs/{run}/merged",
        merged_check=ancient(GATES.merged.verdict),  # gate, read by none
        facts=BUILD.of_run("results/models/{model}/facts.json"),
    output:
        gguf=BUILD.kept("f16", "results/runs/{run}/gguf/{run}-F16.gguf"),
    log:
        "logs/runs/{run}/convert_gguf.log",
    benchmark:
        "benchmarks/runs/{run}/convert_gguf.tsv"
    threads: RESOURCES.threads_of_run
    params:
        name=lambda wildcards: wildcards.run,
        tokenizer=[],
        published=lambda wildcards: PARAMS.published(wildcards.run),


rule convert_adapter:
    """Convert the adapter alone to a GGUF LoRA, for use with the GGUF of its base."""
    input:
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        config="results/runs/{run}/adapter/adapter_config.json",
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
    output:
        gguf="results/runs/{run}/gguf/{run}-adapter.gguf",
    log:
        "logs/runs/{run}/convert_adapter.log",
    benchmark:
        "benchmarks/runs/{run}/convert_adapter.tsv"
    conda:
        "../envs/export.yaml"
    resources:
        mem_mb=growing(4_000),
        runtime=growing(30),  # minutes
    params:
        adapter=subpath(input.adapter, parent=True),
        output_version=output_version("quantize/convert_adapter"),
    shell:
        "python -m workflow_scripts.quantize.convert_adapter --adapter {params.adapter:q}"
        " --checkpoint {input.checkpoint:q} --name {wildcards.run:q} --gguf {output.gguf:q}"
        " > {log:q} 2>&1"


rule check_gguf:
    """Gate: the F16 GGUF reads the same tokens and computes the same logits as the merged model."""
    input:
        gguf="results/runs/{run}/gguf/{run}-F16.gguf",
        merged="results/runs/{run}/merged",
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        clean=BUILD.of_run("results/data/{dataset}/clean/validation.parquet"),
        tokens=BUILD.of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
    output:
        check=update(GATES.gguf.verdict),
        passed=GATES.gguf.passed,
    log:
        "logs/runs/{run}/check_gguf.log",
    benchmark:
        "benchmarks/runs/{run}/check_gguf.tsv"
    conda:
        "../envs/export.yaml"
    threads: RESOURCES.threads_of_run
    resources:
        gpu=RESOURCES.gpus_of_run,
        mem_mb=memory_of_models(1.1),  # the GGUF; the merged model is streamed
        runtime=growing(120),  # minutes
    params:
        settings=GATES.gguf.settings,
        output_version=GATES.gguf.version,
        last_attempt=GATES.last_attempt(GATES.gguf),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.quantize.check_gguf --gguf {input.gguf:q}"
        " --merged {input.merged:q} --facts {input.facts:q} --clean {input.clean:q}"
        " --tokens {input.tokens:q} --settings {params.settings:q} --threads {threads}"
        " --check {output.check:q} > {log:q} 2>&1"
        " && printf %s {params.settings:q}' '{params.output_version} > {output.passed:q}"


rule compute_imatrix:
    """Importance matrix of the F16 GGUF, on chats of the training split and the user's files."""
    input:
        gguf="results/runs/{run}/gguf/{run}-F16.gguf",
        gguf_check=ancient(GATES.gguf.verdict),  # gate, read by none
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        tokens=BUILD.of_run("results/data/{dataset}/{model}/tokens/train.arrow"),
        texts=USER_FILES.calibration_texts(),
    output:
        imatrix="results/runs/{run}/gguf/imatrix.gguf",
    log:
        "logs/runs/{run}/compute_imatrix.log",
    benchmark:
        "benchmarks/runs/{run}/compute_imatrix.tsv"
    conda:
        "../envs/export.yaml"
    threads: RESOURCES.threads_of_run
    resources:
        gpu=RESOURCES.gpus_of_run,
        mem_mb=memory_of_models(1.1),
        runtime=growing(240),  # minutes
    params:
        settings=PARAMS.imatrix(),
        texts=lambda wildcards, input: flagged("--texts", input.texts),
        output_version=output_version("quantize/compute_imatrix"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.quantize.compute_imatrix --gguf {input.gguf:q}"
        " --facts {input.facts:q} --tokens {input.tokens:q} {params.texts:q}"
        " --settings {params.settings:q} --threads {threads} --imatrix {output.imatrix:q}"
        " > {log:q} 2>&1"


rule quantize_gguf:
    """Quantize the F16 GGUF with llama.cpp's own quantizer; several types run in parallel."""
    input:
        gguf="results/runs/{run}/gguf/{run}-F16.gguf",
        gguf_check=ancient(GATES.gguf.verdict),  # gate, read by none
        imatrix=TARGETS.imatrix,
    output:
        quantized="results/runs/{run}/gguf/{run}-{quant}.gguf",
    log:
        "logs/runs/{run}/quantize_gguf/{quant}.log",
    benchmark:
        "benchmarks/runs/{run}/quantize_gguf/{quant}.tsv"
    conda:
        "../envs/export.yaml"
    threads: RESOURCES.threads_of_quantizing
    resources:
        mem_mb=growing(2_000),
        runtime=growing(60),  # minutes
    params:
        settings=PARAMS.mix,
        imatrix=lambda wildcards, input: flagged("--imatrix", input.imatrix),
        output_version=output_version("quantize/quantize_gguf"),
    shell:
        "python -m workflow_scripts.quantize.quantize_gguf --gguf {input.gguf:q}"
        " --settings {params.settings:q} {params.imatrix:q} --threads {threads}"
        " --quantized {output.quantized:q} > {log:q} 2>&1"


rule quantize_awq:
    """The merged model in AWQ's 4 bits, calibrated on chats of the training split."""
    input:
        merged="results/runs/{run}/merged",
        merged_check=ancient(GATES.merged.verdict),  # gate, read by none
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        tokens=BUILD.of_run("results/data/{dataset}/{model}/tokens/train.arrow"),
    output:
        awq=directory("results/runs/{run}/awq"),
    log:
        "logs/runs/{run}/quantize_awq.log",
    benchmark:
        "benchmarks/runs/{run}/quantize_awq.tsv"
    conda:
        "../envs/awq.yaml"
    threads: RESOURCES.threads_of_run
    resources:
        gpu=RESOURCES.gpus_of_run,
        mem_mb=memory_of_models(3),
        runtime=growing(1440),  # minutes
    params:
        settings=CONFIG.awq.model_dump_json(exclude={"use"}),
        output_version=output_version("quantize/quantize_awq"),
    shell:
        "python -m workflow_scripts.take_gpus {resources.gpu}"
        " python -m workflow_scripts.quantize.quantize_awq --merged {input.merged:q}"
        " --facts {input.facts:q} --tokens {input.tokens:q} --settings {params.settings:q}"
        " --awq {output.awq:q} > {log:q} 2>&1"
