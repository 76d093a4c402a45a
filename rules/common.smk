# Config, wildcard constraints and input functions; no rules.
import ast
import json
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(workflow.basedir))

from workflow_scripts import environment, sweeps
from workflow_scripts.data import sources
from workflow_scripts.export import given, origin
from workflow_scripts.log import StageError
from workflow_scripts.settings import RUN_TABLES, ReadingSettings, is_local, load_config

try:
    CONFIG = load_config(config)
except StageError as error:
    raise WorkflowError(str(error)) from None

environment.prepare(Path(workflow.basedir))

RUNS = {name: CONFIG.runs[name] for name in CONFIG.build}
# By how they begin: trained here, or with an adapter or a merged model of the user's.
TRAINED_RUNS = {name: run for name, run in CONFIG.runs.items() if run.is_trained}
ADAPTER_RUNS = {name: run for name, run in CONFIG.runs.items() if run.adapter}
MERGED_RUNS = {name: run for name, run in CONFIG.runs.items() if run.merged}
MEASURED_MERGES = [name for name, run in RUNS.items() if run.merge_base == "auto"]
# Runs with lists in their recipe, each with the names of the runs that it stands for.
SWEEPS = sweeps.expand(config).runs
SWEEP_RUNS = [name for names in SWEEPS.values() for name in names]
QUANTIZATIONS = list(CONFIG.gguf.quantizations)
GGUF_TYPES = ["F16", *QUANTIZATIONS]
RELEASED_TYPES = GGUF_TYPES if CONFIG.retention.f16 else QUANTIZATIONS
GENERATED_MODELS = [name for name, model in CONFIG.models.items() if model.generate]
GENERATED_DATASETS = [name for name, dataset in CONFIG.datasets.items() if dataset.generate]
HUB_SOURCES = {
    name
    for dataset in CONFIG.datasets.values()
    for name, source in dataset.all_sources.items()
    if source.hub
}


def any_of(names):
    """A wildcard constraint: one of these names and nothing else."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"


wildcard_constraints:
    model=any_of(CONFIG.models),
    dataset=any_of(CONFIG.datasets),
    packing=any_of(CONFIG.packings),
    source=any_of(HUB_SOURCES),
    run=any_of(CONFIG.runs),
    text=any_of(CONFIG.evaluation.texts),
    quant=any_of(QUANTIZATIONS),
    gguf=any_of(GGUF_TYPES),


def settings_json(table, name, *keys):
    """The JSON a stage is handed: an entry of a table, or the part of it under `keys`."""
    settings = CONFIG.entry(table, name)
    for key in keys:
        settings = getattr(settings, key)
    return settings.model_dump_json()


def base_model_json(wildcards):
    """Where a base model comes from; how its tokenizer is read must not fetch it again."""
    model = CONFIG.models[wildcards.model]
    return model.model_dump_json(include={"source", "revision"})


def tokenizer_version(wildcards):
    """`--version` where the config says what the checkpoint's own files would else be asked for."""
    version = CONFIG.models[wildcards.model].tokenizer_version
    return ["--version", version] if version else []


def facts_arguments(wildcards):
    """What the config says of a model beside the checkpoint's own files, where it says anything."""
    scaling = CONFIG.models[wildcards.model].rope_scaling
    rope = ["--rope-scaling", scaling.model_dump_json()] if scaling else []
    return tokenizer_version(wildcards) + rope


def kept(what, file):
    """An output as the config wants it: one that does not stay goes once nothing needs it."""
    return file if getattr(CONFIG.retention, what) else temp(file)


def output_version(stage):
    """A stage's OUTPUT_VERSION, read without running it: a changed algorithm makes its files anew."""
    source = Path(workflow.basedir, "workflow_scripts", f"{stage}.py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "OUTPUT_VERSION":
            return ast.literal_eval(node.value)
    raise WorkflowError(f"{source} has no OUTPUT_VERSION")


def of_run(pattern):
    """An input function: `pattern` with {model}, {dataset}, {packing} filled in from the run."""

    def fill(wildcards):
        run = CONFIG.runs[wildcards.run]
        # Other wildcards stay as they are for Snakemake.
        names = {"model": run.model, "dataset": run.dataset, "packing": run.packing}
        return pattern.format(run=wildcards.run, **names)

    return fill


def text_of_run(wildcards):
    """The chunks of a text, by the tokenizer of a run's model."""
    model = CONFIG.runs[wildcards.run].model
    return f"results/evaluation/{model}/texts/{wildcards.text}.arrow"


def threads_of(table, name):
    """8 threads for a real model; one for the demo's, whose jobs are mostly start-up."""
    model = name if table == "models" else CONFIG.runs[name].model
    return 1 if CONFIG.models[model].generate else 8


def threads_for_run(wildcards):
    return threads_of("runs", wildcards.run)


def threads_for_quantizing(wildcards):
    """Half of what other stages take, so that two quantizations run side by side."""
    return max(1, threads_for_run(wildcards) // 2)


def threads_for_dataset(wildcards):
    """As many processes clean and render a dataset; the demo's is done sooner than they start."""
    return 1 if CONFIG.datasets[wildcards.dataset].generate else 8


def threads_for_model(wildcards):
    return threads_of("models", wildcards.model)


def all_cores():
    """Every core Snakemake was given, so that a job is alone; 8 where it needs none (--report)."""
    return workflow.resource_settings.cores or 8


def gpus_for_run(wildcards):
    """A GPU slot for a real model; the demo's is small enough for none, and uses one if it is there."""
    return 0 if CONFIG.models[CONFIG.runs[wildcards.run].model].generate else 1


def gpus_for_training(wildcards):
    """GPU slots of a training job, on all its nodes; none for the demo's model."""
    training = CONFIG.training
    return gpus_for_run(wildcards) * training.gpus * training.nodes


def training_json(resources):
    """The table `training`, with as many GPUs a node as the job was given: a profile may have
    fewer. Without a GPU slot there are as many processes as the table says."""
    gpus = resources.gpu // CONFIG.training.nodes or CONFIG.training.gpus
    return CONFIG.training.model_copy(update={"gpus": gpus}).model_dump_json()


def gpus_for_model(wildcards):
    return 0 if CONFIG.models[wildcards.model].generate else 1


def scoring_json():
    """The keys of `evaluation` that change a score; gates and timing are others'."""
    return CONFIG.evaluation.model_dump_json(include={"piece_tokens", "max_conversations"})


def imatrix_json():
    """The keys of `gguf.imatrix` that change the matrix; which quantization takes it is another's."""
    return CONFIG.gguf.imatrix.model_dump_json(include={"n_tokens"})


def calibration_text_files():
    """Text files of the user's that the importance matrix is computed on beside the chats."""
    return [str(Path(name).expanduser()) for name in CONFIG.gguf.imatrix.files]


def imatrix_of_quantization(wildcards):
    """The importance matrix, where a quantization is made with one."""
    if not CONFIG.gguf.uses_imatrix(wildcards.quant):
        return []
    return [f"results/runs/{wildcards.run}/gguf/imatrix.gguf"]


def source_files(dataset):
    """What each source of a dataset is read from: the user's files, what was fetched, or made."""
    settings = CONFIG.datasets[dataset]
    if settings.generate:
        return {"demo": [f"results/data/{dataset}/source/conversations.jsonl"]}
    return {
        name: (
            [f"results/data/{dataset}/hub/{name}/rows.parquet"]
            if source.hub
            else sources.expand(source.files)
        )
        for name, source in settings.all_sources.items()
    }


def held_out_files(dataset):
    """Evaluation files of the user's that training must not hold."""
    decontamination = CONFIG.datasets[dataset].cleaning.decontamination
    return sources.expand(decontamination.files) if decontamination else []


def given_files(name):
    """The files of a run's adapter or merged model that lie on this machine already."""
    run = CONFIG.runs[name]
    source = run.adapter or run.merged
    if source is None or not is_local(source):
        return []
    find = given.model_files if run.merged else given.adapter_files
    return [str(path) for path in find(Path(source).expanduser())]


def given_json(name):
    """What fetching a run's adapter or merged model depends on."""
    keys = {"model", "dataset", "adapter", "merged", "revision"}
    return CONFIG.runs[name].model_dump_json(include=keys)


# Looked for here, so that a file which is not there stops everything with its message alone.
for name, run in {**RUNS, **{name: CONFIG.runs[name] for name in SWEEP_RUNS}}.items():
    try:
        source_files(run.dataset), held_out_files(run.dataset)
    except StageError as error:
        raise WorkflowError(f"datasets.{run.dataset}: {error}") from None
    try:
        given_files(name)
    except StageError as error:
        raise WorkflowError(f"runs.{name}: {error}") from None


def dataset_files(wildcards):
    return [file for files in source_files(wildcards.dataset).values() for file in files]


def evaluation_text_files(wildcards):
    return held_out_files(wildcards.dataset)


def source_arguments(wildcards):
    """`--source name file …` for every source."""
    return [
        argument
        for name, files in source_files(wildcards.dataset).items()
        for argument in ("--source", name, *files)
    ]


def cleaning_json(wildcards):
    """What cleaning a dataset depends on beside its files: the cleaning table, and each source's
    format, columns and weight."""
    dataset = CONFIG.datasets[wildcards.dataset]
    return json.dumps(
        {
            "cleaning": dataset.cleaning.model_dump(),
            "sources": {
                name: source.model_dump(include=set(ReadingSettings.model_fields))
                for name, source in dataset.all_sources.items()
                if not dataset.generate
            },
        }
    )


def hub_source_json(wildcards):
    """Which dataset of the Hub a source is; how it is read is cleaning's affair."""
    source = CONFIG.datasets[wildcards.dataset].all_sources[wildcards.source]
    return source.model_dump_json(include={"hub", "revision", "subset", "split"})


def flagged(flag, files):
    """A flag with its files, or nothing where there are none."""
    return [flag, *files] if files else []


def data_files():
    """Tokens of every run that passed their gate, and the plan of what is trained."""
    checks = {f"results/data/{run.dataset}/{run.model}/tokens/check.json" for run in RUNS.values()}
    plans = {f"{folder}/plan.parquet" for folder in packing_folders()}
    return sorted(checks | plans)


def built_models():
    return sorted({run.model for run in RUNS.values()})


def packing_folders():
    return {
        f"results/data/{run.dataset}/{run.model}/{run.packing}"
        for run in RUNS.values()
        if run.is_trained
    }


def preview_files():
    """The pages on the data: what was kept and why, conversations as tokens, how they are packed."""
    cleaned = {f"results/data/{run.dataset}/clean/cleaning_report.html" for run in RUNS.values()}
    pages = ("preview.html", "packing.html")
    return sorted(cleaned | {f"{folder}/{page}" for folder in packing_folders() for page in pages})


def built(runs):
    """Those of some runs that `build` names, in its order."""
    return [name for name in RUNS if name in runs]


def adapter_files():
    return expand("results/runs/{run}/adapter/adapter_model.safetensors", run=built(TRAINED_RUNS))


def export_files():
    return [
        *expand("results/runs/{run}/merged_check.json", run=RUNS),
        *expand("results/runs/{run}/gguf_check.json", run=RUNS),
        *expand("results/runs/{run}/gguf/{run}-{gguf}.gguf", run=RUNS, gguf=GGUF_TYPES),
        *(expand("results/runs/{run}/awq", run=RUNS) if CONFIG.awq.use else []),
    ]


def adapter_gguf_files():
    """The adapters of runs that have one, and the bases that they go on."""
    runs = {
        name: run
        for name, run in RUNS.items()
        if run.adapter or (run.is_trained and CONFIG.recipes[run.recipe].method != "full")
    }
    bases = sorted({run.model for run in runs.values()})
    return [
        *expand("results/runs/{run}/gguf/{run}-adapter.gguf", run=runs),
        *expand("results/models/{model}/gguf/{model}-F16.gguf", model=bases),
    ]


def base_scores(run):
    """Scores of a run's base model, 16-bit and 4-bit: made once for all runs that share it."""
    folder = f"results/evaluation/{run.model}/{run.dataset}"
    return [f"{folder}/base.json", f"{folder}/base-nf4.json"]


def links_of(name):
    """The links of a run's chain after its base; a model merged elsewhere comes without adapter."""
    return [*([] if name in MERGED_RUNS else ["adapter"]), "merged", *GGUF_TYPES]


def run_scores(name):
    return [f"results/runs/{name}/evaluation/{link}.json" for link in links_of(name)]


def token_scores(scores):
    """The losses of every token, which stand beside the scores made of them."""
    return [f"{file.removesuffix('.json')}.tokens.parquet" for file in scores]


def chain_token_scores(names=RUNS):
    """Of every link of some runs."""
    files = {file for name in names for file in base_scores(RUNS[name]) + run_scores(name)}
    files |= {file for name in names for file in awq_scores(name)}
    return token_scores(sorted(files))


def run_speeds(name):
    return [f"results/runs/{name}/evaluation/{link}.inference.json" for link in links_of(name)]


def run_divergences(name):
    return [f"results/runs/{name}/evaluation/{quant}.divergence.json" for quant in QUANTIZATIONS]


def text_scores(names=RUNS):
    """Of the texts that the config names: the base once a model, the merged model and every GGUF."""
    files = set()
    for text in CONFIG.evaluation.texts:
        for name in names:
            files.add(f"results/evaluation/{RUNS[name].model}/texts/{text}/base.json")
            folder = f"results/runs/{name}/evaluation/texts/{text}"
            files |= {f"{folder}/{link}.json" for link in ("merged", *GGUF_TYPES)}
    return sorted(files)


def evaluation_files(names=RUNS):
    """Scores, speed and divergence of every link of some runs."""
    files = set()
    for name in names:
        files |= {*base_scores(RUNS[name]), *run_scores(name), *run_speeds(name)}
        files |= {*run_divergences(name), *awq_scores(name)}
    return sorted(files)


def context_text_files():
    return [str(Path(name).expanduser()) for name in CONFIG.evaluation.context.files]


# One that honours the window, and the file that people run.
CONTEXT_LINKS = ["merged", QUANTIZATIONS[-1]]


def answer_files():
    links = ["merged", *GGUF_TYPES]
    of_runs = expand("results/runs/{run}/evaluation/{link}.answers.json", run=RUNS, link=links)
    return base_files("answers") + of_runs


def base_files(what):
    """A JSON of the base of every run, made once a model and dataset."""
    runs = RUNS.values()
    return sorted(
        {f"results/evaluation/{run.model}/{run.dataset}/base.{what}.json" for run in runs}
    )


def context_files():
    of_runs = expand(
        "results/runs/{run}/evaluation/{link}.context.json", run=RUNS, link=CONTEXT_LINKS
    )
    return base_files("context") + of_runs


def report_files():
    return [
        "results/report/overview.html",
        "results/report/all_metrics.parquet",
        *expand("results/runs/{run}/report.html", run=RUNS),
        *expand("results/report/comparison.{form}", form=["tsv", "md", "html"]),
        *expand("results/report/chain.{form}", form=["tsv", "md", "html", "svg"]),
        *(["results/report/loss.svg"] if built(TRAINED_RUNS) else []),
    ]


def awq_scores(name):
    """Scores of a run's AWQ model, where it is made. No speed: what runs here are its weights,
    without AWQ's kernels."""
    return [f"results/runs/{name}/evaluation/awq.json"] if CONFIG.awq.use else []


def experiment_files():
    """Of an overlay in `config/experiments/`: its runs trained and compared, nothing exported."""
    return expand("results/report/experiment.{form}", form=["tsv", "md", "html", "svg"])


def sweep_files():
    """Of the sweeps in `runs`: every combination trained, scored on validation and ranked."""
    if not SWEEPS:
        raise WorkflowError(
            "no run of this config is a sweep\n"
            "  where:    runs.<name>.recipe\n"
            "  to fix:   --configfile config/sweeps/learning_rate.yaml shows one: a recipe with"
            " `sweep: true` and a list of values"
        )
    return expand("results/report/sweep.{form}", form=["tsv", "md", "html", "svg"])


def disk_json():
    """What the large files of a build depend on."""
    gguf = CONFIG.gguf.model_dump(include={"mixes", "quantizations"})
    runs = {name: run.model for name, run in RUNS.items()}
    return json.dumps({"runs": runs, "gguf": gguf, "awq": CONFIG.awq.use})


def published_json(name):
    """What a run's files and card say of where they come from."""
    run = CONFIG.runs[name]
    model, dataset = CONFIG.models[run.model], CONFIG.datasets[run.dataset]
    return json.dumps(origin.published(run, model, dataset, CONFIG.gguf.quantized_by))


def release_files():
    return expand("results/runs/{run}/release", run=RUNS)


def release_json(name):
    """The config of a run, resolved, as its release tells it: what changes a file of it or a figure;
    how pages are previewed and speed is timed does not."""
    run = CONFIG.runs[name]
    entries = {
        field: json.loads(settings_json(table, getattr(run, field)))
        for field, table in RUN_TABLES.items()
        if getattr(run, field)
    }
    entries["dataset"].pop("preview")
    return json.dumps(
        {
            **entries,
            "gguf": CONFIG.gguf.model_dump(),
            "evaluation": json.loads(scoring_json()),
        }
    )


def merge_base_choice(wildcards):
    """The file of `choose_merge_base`, for the runs that ask it."""
    is_measured = CONFIG.runs[wildcards.run].merge_base == "auto"
    return "results/runs/{run}/merge_base.json" if is_measured else []


def merge_base(wildcards, input):
    """`--merge-base`: what the config names, or the file that says what was measured."""
    return input.choice or CONFIG.runs[wildcards.run].merge_base


def live_adapter(wildcards, input):
    """Arguments of the link `adapter`: what was trained, live on the base it was trained on."""
    adapter = str(Path(input.adapter).parent)
    precision = CONFIG.trained_precision(wildcards.run)
    return ["--checkpoint", input.checkpoint, "--adapter", adapter, "--precision", precision]


def merged_adapter(wildcards, input):
    """Arguments of the gate: what was merged, how it was trained, and into which base."""
    return [
        "--adapter",
        str(Path(input.adapter).parent),
        "--precision",
        CONFIG.trained_precision(wildcards.run),
        "--merge-base",
        merge_base(wildcards, input),
    ]


def beginning(wildcards):
    """Of a run: the manifest of its training, or where else its model came from."""
    if wildcards.run in MERGED_RUNS:
        return f"results/runs/{wildcards.run}/merged"
    name = "source.json" if wildcards.run in ADAPTER_RUNS else "training_manifest.json"
    return f"results/runs/{wildcards.run}/adapter/{name}"


def runs_json(names=RUNS):
    """What the report needs to know: the runs, what each combines, and the quantizations."""
    runs = {name: CONFIG.runs[name].model_dump() for name in names}
    return json.dumps({"runs": runs, "gguf_types": GGUF_TYPES, "awq": CONFIG.awq.use})


def training_files(name):
    """What the page of a run draws of its training, where it was trained here."""
    if name not in TRAINED_RUNS:
        return []
    folder = f"results/runs/{name}"
    of_adapter = [f"{folder}/adapter/{file}.json" for file in ("history", "training_manifest")]
    return [*of_adapter, f"{folder}/memory_plan.json"]


def experiment_json():
    """Every run trained and built with its settings; arms and seeds are found in these."""
    tables = ("packing", "recipe")
    return json.dumps(
        {
            name: {"model": run.model, "dataset": run.dataset}
            | {
                table: json.loads(settings_json(f"{table}s", getattr(run, table)))
                for table in tables
            }
            for name, run in RUNS.items()
            if run.is_trained
        }
    )


def sweep_json():
    """Every sweep with what its runs share, and the swept values of each."""
    combinations = sweeps.expand(config).recipes
    return json.dumps(
        {
            sweep: {
                "recipe": combinations[CONFIG.runs[runs[0]].recipe].recipe,
                "runs": {name: swept_values(name, combinations) for name in runs},
            }
            for sweep, runs in SWEEPS.items()
        }
    )


def swept_values(name, combinations):
    """The swept keys of a run with the values as validated: `2e-4` is a number."""
    recipe = CONFIG.runs[name].recipe
    settings = CONFIG.recipes[recipe].model_dump(mode="json")
    return {key: settings[key] for key in combinations[recipe].values}
