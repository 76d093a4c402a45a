# What models, data and training are made from; no rules.
def base_model_json(wildcards):
    """Where a base model comes from; how its tokenizer is read must not fetch it again."""
    model = CONFIG.models[wildcards.model]
    return model.model_dump_json(include={"source", "revision"})


def local_model_hashes(wildcards, resources):
    """What lies in a local folder: for the key of `--cache` alone, as the versions of packages."""
    source = Path(CONFIG.models[wildcards.model].source).expanduser()
    return shared_cache.content_of(source) if IS_SHARED else {}


# A key of `--cache` says how a file is made: where that gives another file on another day or machine,
# it would stand for both.
if IS_SHARED:
    try:
        shared_cache.check(CONFIG, MADE_RUNS, workflow.workflow_settings.cache)
    except StageError as error:
        raise WorkflowError(str(error)) from None


def tokenizer_version(wildcards):
    """`--version` where the config says what the checkpoint's own files would else be asked for."""
    version = CONFIG.models[wildcards.model].tokenizer_version
    return ["--version", version] if version else []


def facts_arguments(wildcards):
    """What the config says of a model beside the checkpoint's own files, where it says anything."""
    scaling = CONFIG.models[wildcards.model].rope_scaling
    rope = ["--rope-scaling", scaling.model_dump_json()] if scaling else []
    return tokenizer_version(wildcards) + rope


def source_files(dataset):
    """What each source of a dataset is read from: the user's files, what was fetched, or made."""
    settings = CONFIG.datasets[dataset]
    if settings.generate:
        return {"demo": [f"results/data/{dataset}/source/conversations.jsonl"]}
    return {
        name: (
            [f"results/data/{dataset}/hub/{name}/rows.parquet"]
            if source.hub
            else [fetched(file) for file in sources.expand(source.files)]
        )
        for name, source in settings.all_sources.items()
    }


def held_out_files(dataset):
    """Evaluation files of the user's that training must not hold."""
    decontamination = CONFIG.datasets[dataset].cleaning.decontamination
    return (
        [fetched(file) for file in sources.expand(decontamination.files)] if decontamination else []
    )


# Looked for here, so that a file which is not there stops everything with its message alone.
for name in [*MADE_RUNS, *(name for name in SWEEP_RUNS if not CONFIG.is_frozen(name))]:
    run = CONFIG.runs[name]
    try:
        source_files(run.dataset), held_out_files(run.dataset)
    except StageError as error:
        raise WorkflowError(f"datasets.{run.dataset}: {error}") from None


def dataset_files(wildcards):
    return [file for files in source_files(wildcards.dataset).values() for file in files]


def evaluation_text_files(wildcards):
    return held_out_files(wildcards.dataset)


def source_arguments(wildcards):
    """`--source name file …` for every source; `--fetched` says where a URL's file lies here."""
    arguments, places = [], []
    for name, files in source_files(wildcards.dataset).items():
        arguments += ["--source", name, *map(name_of, files)]
        places += [("--fetched", name_of(file), file) for file in files if name_of(file) != file]
    return [*arguments, *(str(part) for place in places for part in place)]


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


def threads_for_dataset(wildcards):
    """As many processes clean and render a dataset; the demo's is done sooner than they start."""
    return 1 if CONFIG.datasets[wildcards.dataset].generate else 8


def gpus_of_a_node(wildcards):
    """GPU slots of a training job on each of its nodes; none for the demo's model."""
    return gpus_for_run(wildcards) * CONFIG.training.gpus


def gpus_for_training(wildcards):
    """On all of them."""
    return gpus_of_a_node(wildcards) * CONFIG.training.nodes


# How the Slurm executor starts a job of several nodes: on the first of them alone, and the job calls
# srun itself. The tasks are the nodes, not the GPUs.
SEVERAL_NODES = {"mpi": "srun", "tasks": CONFIG.training.nodes, "tasks_per_gpu": 0}


def training_json(resources, n_nodes=1):
    """The table `training`, with as many GPUs a node as the job was given on so many: a profile may
    have fewer. Without a GPU slot there are as many processes as the table says."""
    gpus = resources.gpu // n_nodes or CONFIG.training.gpus
    return CONFIG.training.model_copy(update={"gpus": gpus}).model_dump_json()
