rule plan_disk:
    """Gate: the disk has room for the build. It has priority, so it stops the build as soon as sizes
    are known. As an input of other rules it would rebuild their files with every new quantization.
    """
    input:
        facts=expand("results/models/{model}/facts.json", model=BUILD.models),
    output:
        disk_plan="results/disk_plan.json",
    log:
        "logs/plan_disk.log",
    priority: 100
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=growing(500),
        runtime=growing(5),  # minutes
    params:
        facts=[f"{name}=results/models/{name}/facts.json" for name in BUILD.models],
        settings=PARAMS.disk(),
        output_version=output_version("release/plan_disk"),
    shell:
        "python -m workflow_scripts.release.plan_disk --facts {params.facts:q}"
        " --settings {params.settings:q} --results results --disk-plan {output.disk_plan:q}"
        " > {log:q} 2>&1"


rule package_release:
    """Package GGUFs, Modelfile, model card with all figures, checksums and provenance."""
    input:
        ggufs=RELEASES.ggufs,
        facts=BUILD.of_run("results/models/{model}/facts.json"),
        tokenizer=BUILD.of_run("results/models/{model}/tokenizer"),
        checkpoint=BUILD.of_run("results/models/{model}/checkpoint"),
        beginning=RELEASES.beginning,
        merged_check=ancient(GATES.merged.verdict),
        gguf_check=ancient(GATES.gguf.verdict),
        scores=lambda wildcards: LINKS.scores(wildcards.run),
        dataset=RELEASES.dataset,
    output:
        release=directory("results/runs/{run}/release"),
    log:
        "logs/runs/{run}/package_release.log",
    benchmark:
        "benchmarks/runs/{run}/package_release.tsv"
    conda:
        "../envs/export.yaml"
    resources:
        mem_mb=growing(1_000),
        runtime=growing(30),  # minutes
    params:
        settings=lambda wildcards: CONFIG.runs[wildcards.run].model_dump_json(),
        config=lambda wildcards: PARAMS.release(wildcards.run),
        published=lambda wildcards: PARAMS.published(wildcards.run),
        benchmarks="benchmarks/runs/{run}",
        gates=GATES.samples(),
        output_version=output_version("release/package_release"),
    shell:
        "python -m workflow_scripts.release.package_release --name {wildcards.run:q}"
        " --settings {params.settings:q} --ggufs {input.ggufs:q} --facts {input.facts:q}"
        " --tokenizer {input.tokenizer:q} --checkpoint {input.checkpoint:q}"
        " --beginning {input.beginning:q} --checks {input.merged_check:q} {input.gguf_check:q}"
        " --scores {input.scores:q} --dataset {input.dataset:q}"
        " --config {params.config:q} --benchmarks {params.benchmarks:q} --published {params.published:q}"
        " --release {output.release:q} > {log:q} 2>&1"


rule push_release:
    """Push releases to the Hub; a dry run unless `push.dry_run` is false. It has no output file."""
    input:
        releases=TARGETS.releases(BUILD.runs),
    log:
        "logs/push_release.log",
    localrule: True
    conda:
        "../envs/data.yaml"
    params:
        settings=CONFIG.push.model_dump_json(),
    shell:
        "python -m workflow_scripts.release.push_release --releases {input.releases:q}"
        " --settings {params.settings:q} 2>&1 | tee {log:q}"


rule store_release:
    """Send a run's release to storage. SHA256SUMS, this job's output, is sent last."""
    input:
        release="results/runs/{run}/release",
    output:
        sums=RELEASES.stored_sums(),
    log:
        "logs/runs/{run}/store_release.log",
    wildcard_constraints:
        run=any_of(BUILD.runs if CONFIG.storage.releases else []),
    localrule: True
    resources:
        mem_mb=growing(1_000),
        runtime=growing(240),  # minutes
    run:
        # Not a program: only Snakemake knows the endpoint and credentials of the storage.
        RELEASES.store(wildcards.run, input.release, output.sums, log[0])
