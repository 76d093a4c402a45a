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


def links_of(name):
    """The links of a run's chain after its base; a model merged elsewhere comes without adapter."""
    return [*([] if name in MERGED_RUNS else ["adapter"]), "merged", *GGUF_TYPES]


def base_scores(run):
    """Scores of a run's base model, 16-bit and 4-bit: made once for all runs that share it."""
    folder = f"results/evaluation/{run.model}/{run.dataset}"
    return [f"{folder}/base.json", f"{folder}/base-nf4.json"]


def run_scores(name):
    return [f"results/runs/{name}/evaluation/{link}.json" for link in links_of(name)]


def awq_scores(name):
    """Scores of a run's AWQ model, where it is made. No speed: what runs here are its weights,
    without AWQ's kernels."""
    return [f"results/runs/{name}/evaluation/awq.json"] if CONFIG.awq.use else []


def token_scores(scores):
    """The losses of every token, which stand beside the scores made of them."""
    return [f"{file.removesuffix('.json')}.tokens.parquet" for file in scores]


def chain_token_scores(names):
    """Of every link of some runs."""
    files = {file for name in names for file in base_scores(RUNS[name]) + run_scores(name)}
    files |= {file for name in names for file in awq_scores(name)}
    return token_scores(sorted(files))


def run_speeds(name):
    return [f"results/runs/{name}/evaluation/{link}.inference.json" for link in links_of(name)]


def run_divergences(name):
    return [f"results/runs/{name}/evaluation/{quant}.divergence.json" for quant in QUANTIZATIONS]


def text_scores(names=MADE_RUNS):
    """Of the texts that the config names: the base once a model, the merged model and every GGUF."""
    files = set()
    for text in CONFIG.evaluation.texts:
        for name in names:
            files.add(f"results/evaluation/{RUNS[name].model}/texts/{text}/base.json")
            folder = f"results/runs/{name}/evaluation/texts/{text}"
            files |= {f"{folder}/{link}.json" for link in ("merged", *GGUF_TYPES)}
    return sorted(files)


def evaluation_files(names=MADE_RUNS):
    """Scores, speed and divergence of every link of some runs."""
    files = set()
    for name in names:
        files |= {*base_scores(RUNS[name]), *run_scores(name), *run_speeds(name)}
        files |= {*run_divergences(name), *awq_scores(name)}
        if CONFIG.evaluation.context.use:
            files |= set(context_scores(name))
        if CONFIG.evaluation.tasks.use:
            files |= set(task_scores(name))
    return sorted(files)


def base_files(what):
    """A JSON of the base of every run, made once a model and dataset."""
    runs = RUNS.values()
    return sorted(
        {f"results/evaluation/{run.model}/{run.dataset}/base.{what}.json" for run in runs}
    )


# One that honours the window, and the file that people run.
TASK_LINKS = ["merged", QUANTIZATIONS[-1]]
CONTEXT_LINKS = TASK_LINKS if CONFIG.evaluation.context.of_merged else TASK_LINKS[1:]


def context_scores(name):
    """Usable context of a run's links, its base's first."""
    run = RUNS[name]
    of_run = expand(f"results/runs/{name}/evaluation/{{link}}.context.json", link=CONTEXT_LINKS)
    return [f"results/evaluation/{run.model}/{run.dataset}/base.context.json", *of_run]


def context_files():
    return sorted({file for name in RUNS for file in context_scores(name)})


def answer_files():
    links = ["merged", *GGUF_TYPES]
    of_runs = expand("results/runs/{run}/evaluation/{link}.answers.json", run=RUNS, link=links)
    return base_files("answers") + of_runs


# Of the overview: the tuned model and the file that people run, both by llama.cpp.
SAMPLE_LINKS = ["F16", QUANTIZATIONS[-1]]


def sampled_runs():
    """The runs whose answers the overview shows."""
    return list(MADE_RUNS) if CONFIG.evaluation.samples.use else []


def overview_answers():
    bases = {(MADE_RUNS[name].model, MADE_RUNS[name].dataset) for name in sampled_runs()}
    return [
        *(f"results/evaluation/{model}/{dataset}/base.answers.json" for model, dataset in bases),
        *expand(
            "results/runs/{run}/evaluation/{link}.answers.json",
            run=sampled_runs(),
            link=SAMPLE_LINKS,
        ),
    ]


def context_pages():
    return expand("results/report/context.{form}", form=["tsv", "md", "html"])


def task_kinds():
    """What the tasks are: those that the config names, and reference answers."""
    return [*(["tasks"] if CONFIG.evaluation.tasks.names else []), "references"]


def task_scores(name):
    """Scores of a run's links in tasks, its base's first, with what every document scored."""
    run = CONFIG.runs[name]
    of_base = {
        "tasks": f"results/evaluation/{run.model}/base.tasks",
        "references": f"results/evaluation/{run.model}/{run.dataset}/base.references",
    }
    stems = [of_base[kind] for kind in task_kinds()] + expand(
        f"results/runs/{name}/evaluation/{{link}}.{{kind}}", link=TASK_LINKS, kind=task_kinds()
    )
    return expand("{stem}.{form}", stem=stems, form=["json", "parquet"])


def task_files():
    return sorted({file for name in RUNS for file in task_scores(name)})


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
