# What merging, quantizing and releasing depend on; no rules.
def given_files(name):
    """The files of a run's adapter or merged model that lie on this machine already."""
    run = CONFIG.runs[name]
    source = run.adapter or run.merged
    if source is None or not is_local(source):
        return []
    find = user_models.model_files if run.merged else user_models.adapter_files
    return [str(path) for path in find(Path(source).expanduser())]


def given_json(name):
    """What fetching a run's adapter or merged model depends on."""
    keys = {"model", "dataset", "adapter", "merged", "revision"}
    return CONFIG.runs[name].model_dump_json(include=keys)


# Looked for here, as the datasets' files are.
for name in MADE_RUNS:
    try:
        given_files(name)
    except StageError as error:
        raise WorkflowError(f"runs.{name}: {error}") from None


def merge_base_choice(wildcards):
    """The file of `choose_merge_base`, for the runs that ask it."""
    is_measured = CONFIG.runs[wildcards.run].merge_base == "auto"
    return "results/runs/{run}/merge_base.json" if is_measured else []


def merge_base(wildcards, input):
    """`--merge-base`: what the config names, or the file that says what was measured."""
    return input.choice or CONFIG.runs[wildcards.run].merge_base


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


def threads_for_quantizing(wildcards):
    """Half of what other stages take, so that two quantizations run side by side."""
    return max(1, threads_for_run(wildcards) // 2)


def imatrix_json():
    """The keys of `gguf.imatrix` that change the matrix; which quantization takes it is another's."""
    return CONFIG.gguf.imatrix.model_dump_json(include={"n_tokens"})


def quantizations_json():
    """The keys of `gguf` that decide the types of tensors."""
    keys = {"mixes": True, "quantizations": True, "imatrix": {"use"}}
    return CONFIG.gguf.model_dump_json(include=keys)


def calibration_text_files():
    """Text files of the user's that the importance matrix is computed on beside the chats."""
    return fetched_texts("gguf.imatrix.files", CONFIG.gguf.imatrix.files)


def imatrix_of_quantization(wildcards):
    """The importance matrix, where a quantization is made with one."""
    if not CONFIG.gguf.uses_imatrix(wildcards.quant):
        return []
    return [f"results/runs/{wildcards.run}/gguf/imatrix.gguf"]


def disk_json():
    """What the large files of a build depend on."""
    gguf = CONFIG.gguf.model_dump(include={"mixes", "quantizations"})
    runs = {name: run.model for name, run in MADE_RUNS.items()}
    return json.dumps({"runs": runs, "gguf": gguf, "awq": CONFIG.awq.use})


def published_json(name):
    """What a run's files and card say of where they come from."""
    run = CONFIG.runs[name]
    model, dataset = CONFIG.models[run.model], CONFIG.datasets[run.dataset]
    return json.dumps(attribution.published(run, model, dataset, CONFIG.gguf.quantized_by))


def beginning(wildcards):
    """Of a run: the manifest of its training, or where else its model came from."""
    if wildcards.run in MERGED_RUNS:
        return f"results/runs/{wildcards.run}/merged"
    name = "source.json" if wildcards.run in ADAPTER_RUNS else "training_manifest.json"
    return f"results/runs/{wildcards.run}/adapter/{name}"


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
    awq = {"awq": CONFIG.awq.model_dump()} if CONFIG.awq.use else {}
    return json.dumps(
        {
            **entries,
            **awq,
            "gguf": CONFIG.gguf.model_dump(),
            "evaluation": json.loads(scoring_json()),
        }
    )


def stored_sums():
    """SHA256SUMS of a run's release on storage; where the config names none, a file no one asks for."""
    folder = CONFIG.storage.releases
    try:
        return remote(f"{folder}/{{run}}/SHA256SUMS") if folder else "results/runs/{run}/SHA256SUMS"
    except StageError as error:
        raise WorkflowError(f"storage.releases: {error}") from None


def store(run, release, sums, log_file):
    """Send a run's release, all but SHA256SUMS, which is left for Snakemake to send."""
    with open(log_file, "w", encoding="utf-8") as stream:

        def say(line):
            print(line, file=stream, flush=True)

        try:
            stored_release.send(
                Path(release),
                f"{CONFIG.storage.releases}/{run}",
                Path(f"results/runs/{run}/stored.json"),
                lambda url: remote(url).flags["storage_object"],
                say,
            )
        except (StageError, WorkflowError) as error:
            say(str(error))
            raise WorkflowError(str(error)) from None
    shutil.copyfile(Path(release, "SHA256SUMS"), sums)
