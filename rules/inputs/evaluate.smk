# What scores and the report depend on; no rules.
def scoring_json():
    """The keys of `evaluation` that change a score; gates and timing are others'."""
    keys = {"piece_tokens", "full_length", "max_conversations"}
    return CONFIG.evaluation.model_dump_json(include=keys)


def text_of_run(wildcards):
    """The chunks of a text, by the tokenizer of a run's model."""
    model = CONFIG.runs[wildcards.run].model
    return f"results/evaluation/{model}/texts/{wildcards.text}.arrow"


def evaluation_text(wildcards):
    text = wildcards.text
    return fetched_texts(f"evaluation.texts.{text}", [CONFIG.evaluation.texts[text]])


# Looked for here, so that what stands in for a text stops everything with its message alone.
for text, name in CONFIG.evaluation.texts.items():
    if not urls.is_url(name):
        fetched_texts(f"evaluation.texts.{text}", [name])


def context_text_files():
    return fetched_texts("evaluation.context.files", CONFIG.evaluation.context.files)


def tasks_json():
    """What changes a score of lm-evaluation-harness."""
    return CONFIG.evaluation.tasks.model_dump_json(exclude={"use", "max_answer_tokens"})


def samples_json():
    """What changes the answers to read."""
    return CONFIG.evaluation.samples.model_dump_json(exclude={"use"})


def references_json():
    """What changes a score of reference answers."""
    return CONFIG.evaluation.tasks.model_dump_json(include={"limit", "max_answer_tokens"})


def own_task_files():
    """The user's task files, with what lies beside them: data, and functions they name."""
    folder = CONFIG.evaluation.tasks.include
    if folder is None:
        return []
    found = sorted(path for path in Path(folder).expanduser().rglob("*") if path.is_file())
    found = [path for path in found if "__pycache__" not in path.parts]
    try:
        for path in found:
            check_whole(path, may_be_empty=True)
    except StageError as error:
        raise WorkflowError(f"evaluation.tasks.include: {error}") from None
    files = [str(path) for path in found]
    if not any(name.endswith((".yaml", ".yml")) for name in files):
        raise WorkflowError(
            "there is no task file\n"
            f"  where:    evaluation.tasks.include, {folder}\n"
            "  expected: a folder with YAML of lm-evaluation-harness"
        )
    return files


def runs_json(names=RUNS):
    """What the report needs to know: the runs, what each combines, and the quantizations."""
    runs = {name: CONFIG.runs[name].model_dump() for name in names}
    return json.dumps({"runs": runs, "gguf_types": GGUF_TYPES, "awq": CONFIG.awq.use})


def results_json(names=RUNS):
    """The same with what else was measured of them: texts, and the links' context and tasks."""
    also = {
        "texts": list(CONFIG.evaluation.texts),
        "context": ["base", *CONTEXT_LINKS] if CONFIG.evaluation.context.use else [],
        "tasks": dict.fromkeys(
            task_kinds() if CONFIG.evaluation.tasks.use else [], ["base", *TASK_LINKS]
        ),
        "hub_ids": hub_ids(names),
    }
    return json.dumps(json.loads(runs_json(names)) | also)


def hub_ids(names):
    """Where the bases of some runs are on the Hub: of those that are as they are there."""
    models = {CONFIG.runs[name].model: CONFIG.models[CONFIG.runs[name].model] for name in names}
    return {
        name: model.source
        for name, model in models.items()
        if model.source and not model.is_local and not model.rope_scaling
    }


def context_json():
    """What the answers on long texts depend on."""
    return CONFIG.evaluation.context.model_dump_json(exclude={"files", "of_merged", "use"})


def data_reports(name):
    """What was counted of a run's conversations and, where it is trained here, of its rows."""
    run = CONFIG.runs[name]
    cleaned = f"results/data/{run.dataset}/clean/cleaning_report.json"
    if name not in TRAINED_RUNS:
        return [cleaned]
    return [cleaned, f"results/data/{run.dataset}/{run.model}/{run.packing}/packing_report.json"]


def training_files(name):
    """What the page of a run draws of its training, where it was trained here."""
    if name not in TRAINED_RUNS:
        return []
    folder = f"results/runs/{name}"
    of_adapter = [f"{folder}/adapter/{file}.json" for file in ("history", "training_manifest")]
    return [*of_adapter, f"{folder}/memory_plan.json"]


def training_reports(name):
    """What was counted of a run's rows and of its training, where it was trained here."""
    if name not in TRAINED_RUNS:
        return []
    of_adapter = f"results/runs/{name}/adapter/training_manifest.json"
    return [data_reports(name)[1], of_adapter]


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
