# Config, wildcard constraints, and what rules of every room use; no rules.
import ast
import gc
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(WORKFLOW_FOLDER))

from workflow_scripts.orchestration import environment, shared_cache
from workflow_scripts.settings import sweeps
from workflow_scripts import urls
from workflow_scripts.chats import sources
from workflow_scripts.release import frozen, stored_release
from workflow_scripts.merge import user_models
from workflow_scripts.quantize import attribution
from workflow_scripts.files import check_whole

# Not as `chain`: Snakemake runs this file with names of its own, and calls one so.
from workflow_scripts.handover import chain as measured_chain
from workflow_scripts.log import StageError
from workflow_scripts.settings import RUN_TABLES, ReadingSettings, is_local, load_config

try:
    CONFIG = load_config(config)
except StageError as error:
    raise WorkflowError(str(error)) from None

environment.prepare(WORKFLOW_FOLDER)
# The objects of a large DAG stay: looking for garbage among them took a fifth of the processor time
# for 1,300 jobs (9.1 s, 7.3 s so).
gc.set_threshold(200_000, 20, 100)

# Stages are told the folder of results by this name.
if workflow.modifier.path_modifier.replace_prefix("results/report") != "results/report":
    raise WorkflowError(
        "a module with a prefix is not supported\n"
        "  where:    the Snakefile that takes this workflow as a module\n"
        "  to fix:   leave out `prefix` and `replace_prefix`; --directory has the results elsewhere"
    )

# Those that reports show, and of them those that this build makes.
RUNS = {name: CONFIG.runs[name] for name in CONFIG.build}
MADE_RUNS = {name: run for name, run in RUNS.items() if not CONFIG.is_frozen(name)}
# By how they begin: trained here, or with an adapter or a merged model of the user's.
TRAINED_RUNS = {name: run for name, run in CONFIG.runs.items() if run.is_trained}
ADAPTER_RUNS = {name: run for name, run in CONFIG.runs.items() if run.adapter}
MERGED_RUNS = {name: run for name, run in CONFIG.runs.items() if run.merged}
# Runs with lists in their recipe, each with the names of the runs that it stands for.
SWEEPS = sweeps.expand(config).runs
SWEEP_RUNS = [name for names in SWEEPS.values() for name in names]
QUANTIZATIONS = list(CONFIG.gguf.quantizations)
LINKS = {link.name: link for link in measured_chain.links(QUANTIZATIONS)}
# Those that are compared token by token with the link that they are made from.
COMPARED_LINKS = {name for name, link in LINKS.items() if "divergence" in link.measured}
GGUF_TYPES = ["F16", *QUANTIZATIONS]
RELEASED_TYPES = GGUF_TYPES if CONFIG.retention.f16 else QUANTIZATIONS
TRANSPLANTED_MODELS = [name for name, model in CONFIG.models.items() if model.transplant]
RANDOM_MODELS = [name for name, model in CONFIG.models.items() if model.generate]
GENERATED_DATASETS = [name for name, dataset in CONFIG.datasets.items() if dataset.generate]
LOCAL_MODELS = [name for name, model in CONFIG.models.items() if model.is_local]
HUB_MODELS = {name for name, model in CONFIG.models.items() if model.source and not model.is_local}
HUB_SOURCES = {
    name
    for dataset in CONFIG.datasets.values()
    for name, source in dataset.all_sources.items()
    if source.hub
}
# `--cache`: base models, tokens and the bases' F16 GGUFs, shared with other working copies.
IS_SHARED = workflow.workflow_settings.cache is not None


def any_of(names):
    """A wildcard constraint: one of these names and nothing else."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"


def any_run_of(names):
    """The same of runs: a frozen one has no rules, its files are as the user's own."""
    return any_of([name for name in names if not CONFIG.is_frozen(name)])


def any_place():
    """Where measurements of a link go: below `runs/` or, of a base, below `evaluation/`."""
    runs, models, datasets = any_run_of(CONFIG.runs), any_of(CONFIG.models), any_of(CONFIG.datasets)
    return f"runs/(?:{runs})/evaluation|evaluation/(?:{models})(?:/(?:{datasets}))?"


wildcard_constraints:
    place=any_place(),
    link=any_of(LINKS),
    model=any_of(CONFIG.models),
    dataset=any_of(CONFIG.datasets),
    packing=any_of(CONFIG.packings),
    source=any_of(HUB_SOURCES),
    run=any_run_of(CONFIG.runs),
    text=any_of(CONFIG.evaluation.texts),
    quant=any_of(QUANTIZATIONS),
    gguf=any_of(GGUF_TYPES),


def settings_json(table, name, *keys):
    """The JSON a stage is handed: an entry of a table, or the part of it under `keys`."""
    settings = CONFIG.entry(table, name)
    for key in keys:
        settings = getattr(settings, key)
    return settings.model_dump_json()


def fetched(name):
    """A file of the user's as an input; one on storage is brought here for as long as jobs need it.

    What stands in for a file is refused here, before any job: some are read after training."""
    if not urls.is_url(name):
        path = Path(name).expanduser()
        check_whole(path, may_be_empty=True)  # an empty one among many is right
        return str(path)
    urls.check_one_file(name)
    return remote(name)


def remote(url):
    """A file on storage, by the plugin for it."""
    return getattr(storage, urls.plugin(url))(url)


def fetched_texts(key, names):
    """Text files of the user's, which `key` of the config names, as inputs."""
    try:
        return [fetched(name) for name in names]
    except StageError as error:
        raise WorkflowError(f"{key}: {error}") from None


def name_of(file):
    """What the config calls an input: the URL of one that comes from storage."""
    on_storage = getattr(file, "flags", {}).get("storage_object")
    return on_storage.query if on_storage else file


def kept(what, file):
    """An output as the config wants it: one that does not stay goes once nothing needs it."""
    return file if getattr(CONFIG.retention, what) else temp(file)


def output_version(stage):
    """A stage's OUTPUT_VERSION, read without running it: a changed algorithm makes its files anew."""
    source = WORKFLOW_FOLDER / "workflow_scripts" / f"{stage}.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "OUTPUT_VERSION":
            return ast.literal_eval(node.value)
    raise WorkflowError(f"{source} has no OUTPUT_VERSION")


def versions_of(*packages):
    """What a shared file depends on beside its rule. Made of the resources, so that it counts in the
    key of `--cache` alone: Snakemake runs nothing again for it."""
    return lambda wildcards, resources: shared_cache.versions(packages) if IS_SHARED else {}


def of_run(pattern):
    """An input function: `pattern` with {model}, {dataset}, {packing} filled in from the run."""

    def fill(wildcards):
        run = CONFIG.runs[wildcards.run]
        # Other wildcards stay as they are for Snakemake.
        names = {"model": run.model, "dataset": run.dataset, "packing": run.packing}
        return pattern.format(run=wildcards.run, **names)

    return fill


def threads_of(table, name):
    """8 threads for a real model; one for the demo's, whose jobs are mostly start-up."""
    model = name if table == "models" else CONFIG.runs[name].model
    return 1 if CONFIG.models[model].built_here else 8


def threads_for_run(wildcards):
    return threads_of("runs", wildcards.run)


def threads_for_model(wildcards):
    return threads_of("models", wildcards.model)


def threads_for_training(wildcards):
    """On this machine a share of the cores, so that as many runs of the demo's as it has train side by
    side: each is slow to use a second one. 8 on a GPU or a cluster."""
    cores = workflow.resource_settings.cores
    if cores is None or gpus_for_run(wildcards):
        return 8
    n_trained = sum(run.is_trained for run in MADE_RUNS.values())
    return max(1, min(8, cores // max(1, n_trained)))


def all_cores():
    """Every core Snakemake was given, so that a job is alone; 8 where it needs none (--report)."""
    return workflow.resource_settings.cores or 8


def gpus_for_run(wildcards):
    """A GPU slot for a real model; the demo's is small enough for none, and uses one if it is there."""
    return 0 if CONFIG.models[CONFIG.runs[wildcards.run].model].built_here else 1


def gpus_for_model(wildcards):
    return 0 if CONFIG.models[wildcards.model].built_here else 1


def growing(amount):
    """A resource of which each attempt asks for as much again."""
    return lambda wildcards, attempt: amount * attempt


def memory_for_models(n_models, beside_mb=4_000):
    """Memory, MB, of a job that holds a model's weights so many times; more with each attempt."""

    def megabytes(wildcards, input, attempt):
        # FileNotFoundError, where the facts are not made yet, has Snakemake ask again when they are.
        facts = json.loads(Path(input.facts).read_text(encoding="utf-8"))
        weights_mb = sum(file["size_bytes"] for file in facts["files"].values()) / 1e6
        return int((n_models * weights_mb + beside_mb) * attempt)

    return megabytes


def flagged(flag, files):
    """A flag with its files, or nothing where there are none."""
    return [flag, *files] if files else []


def live_adapter(wildcards, input):
    """Arguments of the link `adapter`: what was trained, live on the base it was trained on."""
    adapter = str(Path(input.adapter).parent)
    precision = CONFIG.trained_precision(wildcards.run)
    return ["--checkpoint", input.checkpoint, "--adapter", adapter, "--precision", precision]
