# What scores and the report depend on; no rules.
def scoring_json():
    """The keys of `evaluation` that change a score; gates and timing are others'."""
    keys = {"piece_tokens", "full_length", "max_conversations"}
    return CONFIG.evaluation.model_dump_json(include=keys)


def owner(wildcards):
    """Whose measurements a {place} holds: names of a run (not of a base), a model and a dataset (not
    of what has nothing to do with one)."""
    kind, name, *rest = wildcards.place.split("/")
    if kind == "runs":
        run = CONFIG.runs[name]
        return {"run": name, "model": run.model, "dataset": run.dataset}
    return {"model": name} | dict(zip(["dataset"], rest))


def of_place(pattern):
    """An input function: `pattern` with the names of the {place}'s owner."""
    return lambda wildcards: pattern.format_map({**wildcards, **owner(wildcards)})


def weights_of(link, wildcards):
    return link.weights.format_map({**owner(wildcards), "link": link.name})


def files_of_link(wildcards):
    """The files that make up a link, by name."""
    link, names = LINKS[wildcards.link], owner(wildcards)
    weights = "gguf" if link.engine == "llama.cpp" else "checkpoint"
    files = {weights: weights_of(link, wildcards)}
    if link.adapter:
        files["adapter"] = link.adapter.format_map(names)
    if link.gate:
        files["gate"] = ancient(link.gate.format_map(names))  # read by none
    return files


def weights_of_source(wildcards):
    """The weights of the link that a link is made from."""
    return weights_of(LINKS[LINKS[wildcards.link].source], wildcards)


def link_arguments(wildcards, input):
    """Which model is measured, as arguments of the program."""
    link = LINKS[wildcards.link]
    if link.engine == "llama.cpp":
        return ["--gguf", input.gguf]
    arguments = ["--checkpoint", input.checkpoint]
    if link.adapter:
        arguments += ["--adapter", str(Path(input.adapter).parent)]
    if link.precision == "trained":
        return [*arguments, "--precision", CONFIG.trained_precision(owner(wildcards)["run"])]
    return [*arguments, "--precision", link.precision] if link.precision else arguments


def threads_for_link(wildcards):
    return threads_of("models", owner(wildcards)["model"])


def gpus_for_link(wildcards):
    return 0 if CONFIG.models[owner(wildcards)["model"]].built_here else 1


def gpus_for_scoring(wildcards):
    """None for llama.cpp as it is installed here."""
    return 0 if LINKS[wildcards.link].engine == "llama.cpp" else gpus_for_link(wildcards)


def memory_for_scoring(wildcards, input, attempt):
    """llama.cpp maps its file; transformers may hold the weights twice as it loads them."""
    n_models = 1.1 if LINKS[wildcards.link].engine == "llama.cpp" else 2
    return memory_for_models(n_models)(wildcards, input, attempt)


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


# One that honours the window, and the file that people run.
TASK_LINKS = ["merged", QUANTIZATIONS[-1]]
CONTEXT_LINKS = TASK_LINKS if CONFIG.evaluation.context.of_merged else TASK_LINKS[1:]


def task_kinds():
    """What the tasks are: those that the config names, and reference answers."""
    return [*(["tasks"] if CONFIG.evaluation.tasks.names else []), "references"]


def chain_settings(name):
    """What the chain of a run depends on."""
    run = CONFIG.runs[name]
    model = CONFIG.models[run.model]
    is_as_published = model.source and not model.is_local and not model.rope_scaling
    return measured_chain.ChainSettings(
        run=run,
        quantizations=QUANTIZATIONS,
        awq=CONFIG.awq.use,
        base_gguf=CONFIG.evaluation.base_gguf,
        texts=list(CONFIG.evaluation.texts),
        context=["base", *CONTEXT_LINKS],
        tasks=["base", *TASK_LINKS],
        task_kinds=task_kinds(),
        hub_id=model.source if is_as_published else None,
    )


def chain_of(name):
    """Where everything measured of a run is."""
    return measured_chain.chain_of(name, chain_settings(name))


def also_measured():
    """Arguments of reports: what they tell of links beside scores and speed."""
    asked = {"context": CONFIG.evaluation.context.use, "tasks": CONFIG.evaluation.tasks.use}
    return flagged("--with", [what for what, is_asked in asked.items() if is_asked])


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
