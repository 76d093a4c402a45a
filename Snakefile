from pathlib import Path

from snakemake.utils import min_version

min_version("9.27")


# Where this file lies: not where Snakemake runs with --directory, nor where a Snakefile lies that
# takes this one as a module.
WORKFLOW_FOLDER = Path(workflow.current_basedir.get_path_or_uri(secret_free=True))
OWN_CONFIG = Path("config", "config.yaml")


# Of the folder Snakemake runs in, where it has one.
configfile: OWN_CONFIG if OWN_CONFIG.exists() else WORKFLOW_FOLDER / OWN_CONFIG


# With `--sdm apptainer`, and then alone: made of envs/tramontane.def.
container: str(WORKFLOW_FOLDER / "envs" / "tramontane.sif")


report: "workflow_scripts/report/captions/workflow.rst"


include: "rules/common.smk"
include: "rules/inputs/gates.smk"
include: "rules/inputs/data.smk"
include: "rules/inputs/export.smk"
include: "rules/inputs/evaluate.smk"
include: "rules/inputs/targets.smk"
include: "rules/models.smk"
include: "rules/demo.smk"
include: "rules/chats.smk"
include: "rules/tokens.smk"
include: "rules/packing.smk"
include: "rules/train.smk"
include: "rules/merge.smk"
include: "rules/quantize.smk"
include: "rules/evaluate.smk"
include: "rules/release.smk"
include: "rules/report.smk"


look_again_after_gates()


# Of the main process alone: not of a cluster's jobs, nor of a dry run.
onerror:
    print(
        "A step failed; its log is in logs/, and named above. What this machine may lack:"
        " python -m workflow_scripts.doctor (with your --configfile)",
        file=sys.stderr,
    )


rule all:
    """The report, and a release of every run in `build`."""
    default_target: True
    input:
        disk_plan(),
        quantization_plans(),
        recipe_checks(),
        held_out("validation", "test"),
        report_files(),
        preview_files(),
        release_files(),


rule data:
    """Chats cleaned, rendered, checked and packed."""
    input:
        data_files(),


rule preview:
    """Pages to look at before any GPU time is spent: what cleaning did, and tokens as trained."""
    input:
        preview_files(),


rule train:
    """An adapter of every run."""
    input:
        recipe_checks(),
        held_out("validation", runs=stopping_runs()),
        adapter_files(),


rule export:
    """Merged models and GGUFs of every run, their gates passed."""
    input:
        disk_plan(),
        quantization_plans(),
        recipe_checks(),
        held_out("validation"),
        export_files(),


rule adapter_gguf:
    """Adapters alone as GGUF LoRAs, and the base in F16 that they share at run time."""
    input:
        recipe_checks(),
        adapter_gguf_files(),


rule evaluate:
    """Scores and speed of every link of every run."""
    input:
        quantization_plans(),
        recipe_checks(),
        held_out("validation", "test"),
        evaluation_files(),
        text_scores(),


rule report:
    """Tables and figures; `snakemake --report report.html` gathers them in one page."""
    input:
        quantization_plans(),
        recipe_checks(),
        held_out("validation", "test"),
        report_files(),
        preview_files(),


rule context:
    """Usable context of every run: base, merged model and smallest file."""
    input:
        quantization_plans(),
        recipe_checks(),
        held_out("validation", "test"),
        context_pages(),


rule samples:
    """Answers of every link to the same prompts, to be read."""
    input:
        quantization_plans(),
        recipe_checks(),
        held_out("validation", "test"),
        "results/report/samples.html",


rule tasks:
    """Tasks with a right answer by every run: base, merged model and smallest file."""
    input:
        quantization_plans(),
        recipe_checks(),
        held_out("validation", "test"),
        task_pages(),


rule store:
    """Releases of every run on storage (`storage.releases`)."""
    input:
        lambda wildcards: stored_files(),


rule experiment:
    """Runs of an overlay in config/experiments/, trained and compared; nothing is exported."""
    input:
        recipe_checks(),
        held_out("validation", runs=built(TRAINED_RUNS, MADE_RUNS)),
        experiment_files(),


rule sweep:
    """Runs of the recipes with lists of values, trained, scored on validation, ranked; not exported."""
    input:
        recipe_checks(made_sweep_runs()),
        held_out("validation", runs=made_sweep_runs()),
        lambda wildcards: sweep_files(),
