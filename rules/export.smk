rule plan_disk:
    """Gate: the disk holds what the build writes. It stops the others by being first, when sizes are
    known: as an input of theirs it would make their files anew with every new quantization."""
    input:
        facts=expand("results/models/{model}/facts.json", model=built_models()),
    output:
        disk_plan="results/disk_plan.json",
    log:
        "logs/plan_disk.log",
    priority: 100
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 500 * attempt,
        runtime=5,  # minutes
    params:
        facts=[f"{name}=results/models/{name}/facts.json" for name in built_models()],
        settings=disk_json(),
        output_version=output_version("export/plan_disk"),
    shell:
        "python -m workflow_scripts.export.plan_disk --facts {params.facts:q}"
        " --settings {params.settings:q} --results results --disk-plan {output.disk_plan:q}"
        " > {log:q} 2>&1"


rule fetch_adapter:
    """An adapter of the user's (`runs.<name>.adapter`), by a copy, once it is known to fit its base."""
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        given=lambda wildcards: given_files(wildcards.run),
    output:
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        config="results/runs/{run}/adapter/adapter_config.json",
        source="results/runs/{run}/adapter/source.json",
    log:
        "logs/runs/{run}/fetch_adapter.log",
    benchmark:
        "benchmarks/runs/{run}/fetch_adapter.tsv"
    wildcard_constraints:
        run=any_of(ADAPTER_RUNS),
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 4_000 * attempt,
        runtime=60,  # minutes
    params:
        settings=lambda wildcards: given_json(wildcards.run),
        adapter=subpath(output.adapter, parent=True),
        output_version=output_version("export/fetch_adapter"),
    shell:
        "python -m workflow_scripts.export.fetch_adapter --settings {params.settings:q}"
        " --checkpoint {input.checkpoint:q} --adapter {params.adapter:q} > {log:q} 2>&1"


rule fetch_merged:
    """A fine-tuned model of the user's (`runs.<name>.merged`): a local folder by links, or the Hub."""
    input:
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        given=lambda wildcards: given_files(wildcards.run),
    output:
        merged=kept("merged", directory("results/runs/{run}/merged")),
    log:
        "logs/runs/{run}/fetch_merged.log",
    benchmark:
        "benchmarks/runs/{run}/fetch_merged.tsv"
    wildcard_constraints:
        run=any_of(MERGED_RUNS),
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 2_000 * attempt,
        runtime=240,  # minutes: 94 GB of Mixtral at 10 MB/s
    params:
        settings=lambda wildcards: given_json(wildcards.run),
        output_version=output_version("export/fetch_merged"),
    shell:
        "python -m workflow_scripts.export.fetch_merged --settings {params.settings:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --merged {output.merged:q}"
        " > {log:q} 2>&1"


rule choose_merge_base:
    """Which weights the adapter is merged into, for `merge_base: auto`: both are scored in memory."""
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        facts=of_run("results/models/{model}/facts.json"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        tokens=of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
        tokens_check=of_run("results/data/{dataset}/{model}/tokens/check.json"),  # gate
    output:
        choice="results/runs/{run}/merge_base.json",
    log:
        "logs/runs/{run}/choose_merge_base.log",
    benchmark:
        "benchmarks/runs/{run}/choose_merge_base.tsv"
    conda:
        "../envs/train.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=lambda wildcards, attempt: 40_000 * attempt,
        runtime=120,  # minutes
    params:
        settings=CONFIG.evaluation.gates.model_dump_json(include={"n_conversations"}),
        adapter=subpath(input.adapter, parent=True),
        output_version=output_version("export/choose_merge_base"),
    shell:
        "python -m workflow_scripts.export.choose_merge_base --checkpoint {input.checkpoint:q}"
        " --facts {input.facts:q} --adapter {params.adapter:q} --tokens {input.tokens:q}"
        " --settings {params.settings:q} --choice {output.choice:q} > {log:q} 2>&1"


rule merge_adapter:
    """Base + adapter in 16 bits, tensor by tensor; a folder that plain from_pretrained loads."""
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        config="results/runs/{run}/adapter/adapter_config.json",
        choice=merge_base_choice,
    output:
        merged=kept("merged", directory("results/runs/{run}/merged")),
    log:
        "logs/runs/{run}/merge_adapter.log",
    benchmark:
        "benchmarks/runs/{run}/merge_adapter.tsv"
    wildcard_constraints:
        run=any_of(CONFIG.runs.keys() - MERGED_RUNS.keys()),
    conda:
        "../envs/train.yaml"
    threads: threads_for_run
    resources:
        mem_mb=lambda wildcards, attempt: 4_000 * attempt,
        runtime=60,  # minutes
    params:
        adapter=subpath(input.adapter, parent=True),
        merge_base=merge_base,
        output_version=output_version("export/merge_adapter"),
    shell:
        "python -m workflow_scripts.export.merge_adapter --checkpoint {input.checkpoint:q}"
        " --facts {input.facts:q} --tokenizer {input.tokenizer:q} --adapter {params.adapter:q}"
        " --merge-base {params.merge_base:q} --merged {output.merged:q} > {log:q} 2>&1"


rule check_merged:
    """Gate: merged = base + adapter, and no worse than the adapter on the base it was trained on."""
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        facts=of_run("results/models/{model}/facts.json"),
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        choice=merge_base_choice,
        merged="results/runs/{run}/merged",
        tokenizer=of_run("results/models/{model}/tokenizer"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
    output:
        check="results/runs/{run}/merged_check.json",
    log:
        "logs/runs/{run}/check_merged.log",
    benchmark:
        "benchmarks/runs/{run}/check_merged.tsv"
    wildcard_constraints:
        run=any_of(CONFIG.runs.keys() - MERGED_RUNS.keys()),
    conda:
        "../envs/train.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=lambda wildcards, attempt: 40_000 * attempt,
        runtime=120,  # minutes
    params:
        settings=CONFIG.evaluation.gates.model_dump_json(),
        adapter=merged_adapter,
        output_version=output_version("export/check_merged"),
    shell:
        "python -m workflow_scripts.export.check_merged --checkpoint {input.checkpoint:q}"
        " --facts {input.facts:q} {params.adapter:q} --tokenizer {input.tokenizer:q}"
        " --merged {input.merged:q} --tokens {input.tokens:q} --settings {params.settings:q}"
        " --check {output.check:q} > {log:q} 2>&1"


use rule check_merged as check_fetched_merged with:
    # A model merged elsewhere: its folder, and that it computes.
    input:
        checkpoint=of_run("results/models/{model}/checkpoint"),
        facts=of_run("results/models/{model}/facts.json"),
        merged="results/runs/{run}/merged",
        tokenizer=of_run("results/models/{model}/tokenizer"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
    wildcard_constraints:
        run=any_of(MERGED_RUNS),
    params:
        settings=CONFIG.evaluation.gates.model_dump_json(),
        adapter=[],
        output_version=output_version("export/check_merged"),


rule convert_gguf:
    """F16 GGUF by llama.cpp's own converter."""
    input:
        merged="results/runs/{run}/merged",
        merged_check="results/runs/{run}/merged_check.json",  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
    output:
        gguf=kept("f16", "results/runs/{run}/gguf/{run}-F16.gguf"),
    log:
        "logs/runs/{run}/convert_gguf.log",
    benchmark:
        "benchmarks/runs/{run}/convert_gguf.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_run
    resources:
        mem_mb=lambda wildcards, attempt: 8_000 * attempt,
        runtime=60,  # minutes
    params:
        name=lambda wildcards: wildcards.run,
        tokenizer=[],
        published=lambda wildcards: published_json(wildcards.run),
        output_version=output_version("export/convert_gguf"),
    shell:
        "python -m workflow_scripts.export.convert_gguf --merged {input.merged:q}"
        " {params.tokenizer:q} --facts {input.facts:q} --name {params.name:q}"
        " --published {params.published:q} --gguf {output.gguf:q} > {log:q} 2>&1"


use rule convert_gguf as convert_gguf_base with:
    input:
        merged="results/models/{model}/checkpoint",
        tokenizer="results/models/{model}/tokenizer",
        facts="results/models/{model}/facts.json",
    output:
        gguf="results/models/{model}/gguf/{model}-F16.gguf",
    log:
        "logs/models/{model}/convert_gguf.log",
    benchmark:
        "benchmarks/models/{model}/convert_gguf.tsv"
    threads: threads_for_model
    params:
        name=lambda wildcards: wildcards.model,
        tokenizer=lambda wildcards, input: ["--tokenizer", input.tokenizer],
        published="{}",
        output_version=output_version("export/convert_gguf"),


rule convert_adapter:
    """The adapter alone as a GGUF LoRA, for the GGUF of its base."""
    input:
        adapter="results/runs/{run}/adapter/adapter_model.safetensors",
        config="results/runs/{run}/adapter/adapter_config.json",
        checkpoint=of_run("results/models/{model}/checkpoint"),
    output:
        gguf="results/runs/{run}/gguf/{run}-adapter.gguf",
    log:
        "logs/runs/{run}/convert_adapter.log",
    benchmark:
        "benchmarks/runs/{run}/convert_adapter.tsv"
    conda:
        "../envs/export.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 4_000 * attempt,
        runtime=30,  # minutes
    params:
        adapter=subpath(input.adapter, parent=True),
        output_version=output_version("export/convert_adapter"),
    shell:
        "python -m workflow_scripts.export.convert_adapter --adapter {params.adapter:q}"
        " --checkpoint {input.checkpoint:q} --name {wildcards.run:q} --gguf {output.gguf:q}"
        " > {log:q} 2>&1"


rule check_gguf:
    """Gate: the F16 GGUF reads the same tokens and computes the same logits as the merged model."""
    input:
        gguf="results/runs/{run}/gguf/{run}-F16.gguf",
        merged="results/runs/{run}/merged",
        facts=of_run("results/models/{model}/facts.json"),
        clean=of_run("results/data/{dataset}/clean/validation.parquet"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/validation.arrow"),
    output:
        check="results/runs/{run}/gguf_check.json",
    log:
        "logs/runs/{run}/check_gguf.log",
    benchmark:
        "benchmarks/runs/{run}/check_gguf.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=lambda wildcards, attempt: 40_000 * attempt,
        runtime=120,  # minutes
    params:
        settings=CONFIG.evaluation.gates.model_dump_json(),
        output_version=output_version("export/check_gguf"),
    shell:
        "python -m workflow_scripts.export.check_gguf --gguf {input.gguf:q}"
        " --merged {input.merged:q} --facts {input.facts:q} --clean {input.clean:q}"
        " --tokens {input.tokens:q} --settings {params.settings:q} --threads {threads}"
        " --check {output.check:q} > {log:q} 2>&1"


rule compute_imatrix:
    """Importance matrix of the F16 GGUF, on chats of the training split and files the user names."""
    input:
        gguf="results/runs/{run}/gguf/{run}-F16.gguf",
        gguf_check="results/runs/{run}/gguf_check.json",  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/train.arrow"),
        texts=calibration_text_files(),
    output:
        imatrix="results/runs/{run}/gguf/imatrix.gguf",
    log:
        "logs/runs/{run}/compute_imatrix.log",
    benchmark:
        "benchmarks/runs/{run}/compute_imatrix.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=lambda wildcards, attempt: 20_000 * attempt,
        runtime=240,  # minutes
    params:
        settings=imatrix_json(),
        texts=lambda wildcards, input: flagged("--texts", input.texts),
        output_version=output_version("export/compute_imatrix"),
    shell:
        "python -m workflow_scripts.export.compute_imatrix --gguf {input.gguf:q}"
        " --facts {input.facts:q} --tokens {input.tokens:q} {params.texts:q}"
        " --settings {params.settings:q} --threads {threads} --imatrix {output.imatrix:q}"
        " > {log:q} 2>&1"


rule quantize_gguf:
    """One quantization of the F16 GGUF by llama.cpp's own quantizer; several run side by side."""
    input:
        gguf="results/runs/{run}/gguf/{run}-F16.gguf",
        gguf_check="results/runs/{run}/gguf_check.json",  # gate, read by none
        imatrix=imatrix_of_quantization,
    output:
        quantized="results/runs/{run}/gguf/{run}-{quant}.gguf",
    log:
        "logs/runs/{run}/quantize_gguf/{quant}.log",
    benchmark:
        "benchmarks/runs/{run}/quantize_gguf/{quant}.tsv"
    conda:
        "../envs/export.yaml"
    threads: threads_for_quantizing
    resources:
        mem_mb=lambda wildcards, attempt: 2_000 * attempt,
        runtime=60,  # minutes
    params:
        settings=lambda wildcards: CONFIG.gguf.mix(wildcards.quant).model_dump_json(),
        imatrix=lambda wildcards, input: flagged("--imatrix", input.imatrix),
        output_version=output_version("export/quantize_gguf"),
    shell:
        "python -m workflow_scripts.export.quantize_gguf --gguf {input.gguf:q}"
        " --settings {params.settings:q} {params.imatrix:q} --threads {threads}"
        " --quantized {output.quantized:q} > {log:q} 2>&1"


rule quantize_awq:
    """The merged model in AWQ's 4 bits, calibrated on chats of the training split."""
    input:
        merged="results/runs/{run}/merged",
        merged_check="results/runs/{run}/merged_check.json",  # gate, read by none
        facts=of_run("results/models/{model}/facts.json"),
        tokens=of_run("results/data/{dataset}/{model}/tokens/train.arrow"),
    output:
        awq=directory("results/runs/{run}/awq"),
    log:
        "logs/runs/{run}/quantize_awq.log",
    benchmark:
        "benchmarks/runs/{run}/quantize_awq.tsv"
    conda:
        "../envs/awq.yaml"
    threads: threads_for_run
    resources:
        gpu=gpus_for_run,
        mem_mb=lambda wildcards, attempt: 48_000 * attempt,
        runtime=1440,  # minutes
    params:
        settings=CONFIG.awq.model_dump_json(exclude={"use"}),
        output_version=output_version("export/quantize_awq"),
    shell:
        "python -m workflow_scripts.export.quantize_awq --merged {input.merged:q}"
        " --facts {input.facts:q} --tokens {input.tokens:q} --settings {params.settings:q}"
        " --awq {output.awq:q} > {log:q} 2>&1"


rule package_release:
    """GGUFs, Modelfile, model card with what was measured, checksums, provenance."""
    input:
        ggufs=lambda wildcards: expand(
            "results/runs/{run}/gguf/{run}-{gguf}.gguf", run=wildcards.run, gguf=RELEASED_TYPES
        ),
        facts=of_run("results/models/{model}/facts.json"),
        tokenizer=of_run("results/models/{model}/tokenizer"),
        checkpoint=of_run("results/models/{model}/checkpoint"),
        beginning=beginning,
        merged_check="results/runs/{run}/merged_check.json",
        gguf_check="results/runs/{run}/gguf_check.json",
        scores=lambda wildcards: run_scores(wildcards.run) + awq_scores(wildcards.run),
        base_scores=lambda wildcards: base_scores(CONFIG.runs[wildcards.run]),
        dataset=lambda wildcards: expand(
            of_run("results/data/{dataset}/clean/{{split}}.parquet")(wildcards),
            split=["train", "validation", "test"],
        ),
    output:
        release=directory("results/runs/{run}/release"),
    log:
        "logs/runs/{run}/package_release.log",
    benchmark:
        "benchmarks/runs/{run}/package_release.tsv"
    conda:
        "../envs/export.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 1_000 * attempt,
        runtime=30,  # minutes
    params:
        settings=lambda wildcards: CONFIG.runs[wildcards.run].model_dump_json(),
        config=lambda wildcards: release_json(wildcards.run),
        published=lambda wildcards: published_json(wildcards.run),
        benchmarks="benchmarks/runs/{run}",
        output_version=output_version("export/package_release"),
    shell:
        "python -m workflow_scripts.export.package_release --name {wildcards.run:q}"
        " --settings {params.settings:q} --ggufs {input.ggufs:q} --facts {input.facts:q}"
        " --tokenizer {input.tokenizer:q} --checkpoint {input.checkpoint:q}"
        " --beginning {input.beginning:q} --checks {input.merged_check:q} {input.gguf_check:q}"
        " --scores {input.base_scores:q} {input.scores:q} --dataset {input.dataset:q}"
        " --config {params.config:q} --benchmarks {params.benchmarks:q} --published {params.published:q}"
        " --release {output.release:q} > {log:q} 2>&1"


rule push_release:
    """Releases to the Hub; a dry run unless `push.dry_run` is false. Has no file: it asks the Hub."""
    input:
        releases=release_files(),
    log:
        "logs/push_release.log",
    conda:
        "../envs/data.yaml"
    params:
        settings=CONFIG.push.model_dump_json(),
    shell:
        "python -m workflow_scripts.export.push_release --releases {input.releases:q}"
        " --settings {params.settings:q} 2>&1 | tee {log:q}"
