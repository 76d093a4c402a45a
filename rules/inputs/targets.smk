# The files that each target asks for, and that the report and releases gather; no rules.
def built(runs, among=RUNS):
    """Those of some runs that `build` names, in its order."""
    return [name for name in among if name in runs]


def built_models():
    return sorted({run.model for run in MADE_RUNS.values()})


def packing_folders():
    return {
        f"results/data/{run.dataset}/{run.model}/{run.packing}"
        for run in MADE_RUNS.values()
        if run.is_trained
    }


# Reports would say of a frozen run what the config says now.
for name in RUNS.keys() - MADE_RUNS.keys():
    try:
        frozen.check(
            name,
            RUNS[name].model_dump(),
            json.loads(release_json(name)),
            Path(f"results/runs/{name}/release"),
        )
    except StageError as error:
        raise WorkflowError(str(error)) from None


def disk_plan():
    """Before anything large is made."""
    return ["results/disk_plan.json"] if MADE_RUNS else []


def quantization_plans():
    """Input function of a target that makes GGUFs: the types that llama.cpp will give them. What GGUF
    has no form of is said before the first job."""

    def plans(wildcards):
        for name in built_models():
            scaling = CONFIG.models[name].rope_scaling
            if scaling and scaling.type == "dynamic":
                raise WorkflowError(
                    "GGUF has no form of dynamic NTK\n"
                    f"  where:    models.{name}.rope_scaling.type\n"
                    "  expected: linear or yarn, for a GGUF\n"
                    "  to fix:   use yarn, or build the target `train`, which makes no GGUF"
                )
        return expand("results/models/{model}/quantization_plan.json", model=built_models())

    return plans


def held_out(*splits, runs=MADE_RUNS):
    """Input function of a target that scores some runs on these splits, before the first job: the
    config gives them a share. It asks for no file; that a share came to a conversation is seen when
    chats are rendered."""

    def check(wildcards):
        for name, split in itertools.product(runs, splits):
            dataset = CONFIG.runs[name].dataset
            if not getattr(CONFIG.datasets[dataset].cleaning, f"{split}_fraction"):
                raise WorkflowError(nothing_held_out(name, dataset, split))
        return []

    return check


def nothing_held_out(name, dataset, split):
    ways_out = {
        "validation": "`snakemake train` scores nothing afterwards",
        "test": "`snakemake export` needs no test split",
    }
    return (
        f"nothing is held out for {split}, and this build scores runs.{name} on it\n"
        f"  where:    datasets.{dataset}.cleaning.{split}_fraction\n"
        "  found:    0\n"
        "  expected: a share above 0, of at least 20 conversations\n"
        f"  to fix:   set {split}_fraction: 0.05 for some hundred conversations, 0.2 for fewer; or"
        f" build less: {ways_out[split]}"
    )


def recipe_checks(runs=MADE_RUNS):
    """Before chats are packed: the recipes of some runs fit their models."""
    trained = [CONFIG.runs[name] for name in runs if CONFIG.runs[name].is_trained]
    return sorted(
        {f"results/models/{run.model}/recipes/{run.recipe}_check.json" for run in trained}
    )


def stopping_runs():
    """Those of the build that stop early by their validation loss."""
    runs = built(TRAINED_RUNS, MADE_RUNS)
    return [name for name in runs if CONFIG.recipes[CONFIG.runs[name].recipe].early_stopping]


def data_files():
    """Tokens of every run that passed their gate, and the plan of what is trained."""
    checks = {
        f"results/data/{run.dataset}/{run.model}/tokens/check.json" for run in MADE_RUNS.values()
    }
    plans = {f"{folder}/plan.parquet" for folder in packing_folders()}
    return sorted(checks | plans)


def preview_files():
    """The pages on the data: what was kept and why, conversations as tokens, how they are packed."""
    cleaned = {
        f"results/data/{run.dataset}/clean/cleaning_report.html" for run in MADE_RUNS.values()
    }
    pages = ("preview.html", "packing.html")
    return sorted(cleaned | {f"{folder}/{page}" for folder in packing_folders() for page in pages})


def adapter_files():
    runs = built(TRAINED_RUNS, MADE_RUNS)
    return expand("results/runs/{run}/adapter/adapter_model.safetensors", run=runs)


def export_files():
    return [
        *expand("results/runs/{run}/merged_check.json", run=MADE_RUNS),
        *expand("results/runs/{run}/gguf_check.json", run=MADE_RUNS),
        *expand("results/runs/{run}/gguf/{run}-{gguf}.gguf", run=MADE_RUNS, gguf=GGUF_TYPES),
        *(expand("results/runs/{run}/awq", run=MADE_RUNS) if CONFIG.awq.use else []),
    ]


def adapter_gguf_files():
    """The adapters of runs that have one, and the bases that they go on."""
    runs = {
        name: run
        for name, run in MADE_RUNS.items()
        if run.adapter or (run.is_trained and CONFIG.recipes[run.recipe].method != "full")
    }
    bases = sorted({run.model for run in runs.values()})
    return [
        *expand("results/runs/{run}/gguf/{run}-adapter.gguf", run=runs),
        *expand("results/models/{model}/gguf/{model}-F16.gguf", model=bases),
    ]


def files_of_chain(names, files_of):
    """Some files of every link of some runs; a base's once for all runs that share it.

    `files_of` takes a link of handover/chain.py and names the files, or None where there is none.
    """
    links = [link for name in names for link in chain_of(name).links]
    return sorted({file for link in links for file in files_of(link) if file})


def chain_token_scores(names):
    """The losses of every token, of every link of some runs."""
    return files_of_chain(names, lambda link: [link.token_scores])


def text_scores(names=MADE_RUNS):
    """Of the texts that the config names: the base once a model, the merged model and every GGUF."""
    return files_of_chain(names, lambda link: link.texts.values())


def evaluation_files(names=MADE_RUNS):
    """Scores, speed and divergence of every link of some runs."""
    return [
        *files_of_chain(names, lambda link: [link.scores, link.speed, link.divergence]),
        *(context_files(names) if CONFIG.evaluation.context.use else []),
        *(task_files(names) if CONFIG.evaluation.tasks.use else []),
    ]


def context_files(names=RUNS):
    """Usable context of the links that are asked."""
    return files_of_chain(names, lambda link: [link.context])


def task_files(names=RUNS):
    """Scores in tasks, with what every document scored."""
    scores = files_of_chain(names, lambda link: link.tasks.values())
    return scores + [measured_chain.samples_beside(file) for file in scores]


def answer_files(names=RUNS):
    return files_of_chain(names, lambda link: [link.answers])


# Of the overview: the base, the tuned model and the file that people run, both by llama.cpp.
SAMPLE_LINKS = ["base", "F16", QUANTIZATIONS[-1]]


def sampled_runs():
    """The runs whose answers the overview shows."""
    return list(MADE_RUNS) if CONFIG.evaluation.samples.use else []


def overview_answers():
    return files_of_chain(
        sampled_runs(), lambda link: [link.answers if link.name in SAMPLE_LINKS else None]
    )


def chain_files(names=RUNS):
    return expand("results/runs/{run}/chain.json", run=names)


def context_pages():
    return expand("results/report/context.{form}", form=["tsv", "md", "html"])


def task_pages():
    return expand("results/report/tasks.{form}", form=["tsv", "md", "html"])


def report_files():
    return [
        "results/report/overview.html",
        "results/report/all_metrics.parquet",
        *expand("results/runs/{run}/report.html", run=MADE_RUNS),
        *expand("results/report/comparison.{form}", form=["tsv", "md", "html"]),
        *expand("results/report/chain.{form}", form=["tsv", "md", "html", "svg"]),
        *(["results/report/loss.svg"] if built(TRAINED_RUNS) else []),
        *(context_pages() if CONFIG.evaluation.context.use else []),
        *(task_pages() if CONFIG.evaluation.tasks.use else []),
    ]


def release_files(names=MADE_RUNS):
    return expand("results/runs/{run}/release", run=names)


def stored_files():
    """SHA256SUMS of every release on storage."""
    if not CONFIG.storage.releases:
        raise WorkflowError(
            "where the releases go to is not said\n"
            "  where:    storage.releases\n"
            "  expected: a folder on storage, as s3://bucket/folder"
        )
    return [remote(f"{CONFIG.storage.releases}/{run}/SHA256SUMS") for run in RUNS]


def experiment_files():
    """Of an overlay in `config/experiments/`: its runs trained and compared, nothing exported."""
    return expand("results/report/experiment.{form}", form=["tsv", "md", "html", "svg"])


def made_sweep_runs():
    return [name for name in SWEEP_RUNS if not CONFIG.is_frozen(name)]


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
