import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.27")


# The folder of this file. Snakemake may run in another one (--directory), and another Snakefile may take
# this one as a module.
WORKFLOW_FOLDER = Path(workflow.current_basedir.get_path_or_uri(secret_free=True))
sys.path.insert(0, str(WORKFLOW_FOLDER))

from workflow_scripts.settings import config_files

# `start` in rules/common.smk puts the catalogue, config/config.yaml, below what is read here.
for path in config_files.defaults(workflow.overwrite_configfiles):

    configfile: path


# With `--sdm apptainer`, and then alone: made of envs/tramontane.def.
container: str(WORKFLOW_FOLDER / "envs" / "tramontane.sif")


report: "workflow_scripts/report/captions/workflow.rst"


include: "rules/common.smk"
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


GATES.look_again()


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
        TARGETS.disk_plan(),
        TARGETS.quantization_plans(),
        TARGETS.recipe_checks(),
        TARGETS.held_out("validation", "test"),
        TARGETS.report(),
        TARGETS.preview(),
        TARGETS.releases(),


rule data:
    """Chats cleaned, rendered, checked and packed."""
    input:
        TARGETS.data(),


rule preview:
    """Pages to look at before any GPU time is spent: what cleaning did, and tokens as trained."""
    input:
        TARGETS.preview(),


rule train:
    """An adapter of every run."""
    input:
        TARGETS.recipe_checks(),
        TARGETS.held_out("validation", runs=BUILD.stopping_runs),
        TARGETS.adapters(),


rule export:
    """Merged models and GGUFs of every run, their gates passed."""
    input:
        TARGETS.disk_plan(),
        TARGETS.quantization_plans(),
        TARGETS.recipe_checks(),
        TARGETS.held_out("validation"),
        TARGETS.exported(),


rule adapter_gguf:
    """Adapters alone as GGUF LoRAs, and the base in F16 that they share at run time."""
    input:
        TARGETS.recipe_checks(),
        TARGETS.adapter_ggufs(),


rule evaluate:
    """Scores and speed of every link of every run."""
    input:
        TARGETS.quantization_plans(),
        TARGETS.recipe_checks(),
        TARGETS.held_out("validation", "test"),
        TARGETS.evaluations(),
        TARGETS.text_scores(),


rule report:
    """Tables and figures; `snakemake --report report.html` gathers them in one page."""
    input:
        TARGETS.quantization_plans(),
        TARGETS.recipe_checks(),
        TARGETS.held_out("validation", "test"),
        TARGETS.report(),
        TARGETS.preview(),


rule context:
    """Usable context of every run: base, merged model and smallest file."""
    input:
        TARGETS.quantization_plans(),
        TARGETS.recipe_checks(),
        TARGETS.held_out("validation", "test"),
        TARGETS.context_pages(),


rule samples:
    """Answers of every link to the same prompts, to be read."""
    input:
        TARGETS.quantization_plans(),
        TARGETS.recipe_checks(),
        TARGETS.held_out("validation", "test"),
        "results/report/samples.html",


rule tasks:
    """Tasks with a right answer by every run: base, merged model and smallest file."""
    input:
        TARGETS.quantization_plans(),
        TARGETS.recipe_checks(),
        TARGETS.held_out("validation", "test"),
        TARGETS.task_pages(),


rule store:
    """Releases of every run on storage (`storage.releases`)."""
    input:
        TARGETS.stored,


rule experiment:
    """Runs of an overlay in config/experiments/, trained and compared; nothing is exported."""
    input:
        TARGETS.recipe_checks(),
        TARGETS.held_out("validation", runs=TARGETS.made_trained_runs()),
        TARGETS.experiment(),


rule sweep:
    """Runs of the recipes with lists of values, trained, scored on validation, ranked; not exported."""
    input:
        TARGETS.recipe_checks(BUILD.made_sweep_runs),
        TARGETS.held_out("validation", runs=BUILD.made_sweep_runs),
        TARGETS.sweep,
