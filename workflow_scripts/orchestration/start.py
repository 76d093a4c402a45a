"""Build the objects that the rules use, from what Snakemake knows when it starts."""

from __future__ import annotations

import gc
from typing import Any

from snakemake.exceptions import WorkflowError

from workflow_scripts import urls
from workflow_scripts.orchestration import environment, shared_cache
from workflow_scripts.orchestration.build import ROOT, Build, stopping
from workflow_scripts.orchestration.gates import Gates
from workflow_scripts.orchestration.links import Links
from workflow_scripts.orchestration.params import Params
from workflow_scripts.orchestration.releases import Releases
from workflow_scripts.orchestration.resources import Resources
from workflow_scripts.orchestration.targets import Targets
from workflow_scripts.orchestration.user_files import UserFiles
from workflow_scripts.settings import Config, config_files, load_config

# The objects that the rules use, in the order of common.smk.
Orchestration = tuple[Config, Build, UserFiles, Links, Params, Resources, Gates, Releases, Targets]


def start(
    workflow: Any,  # untyped: Snakemake's
    config: dict[str, Any],  # untyped: as Snakemake read it
    storage: Any,  # untyped: Snakemake's
) -> Orchestration:
    """The objects that the rules use, in the order of common.smk.

    Args:
        workflow, config, storage: the objects that Snakemake provides in a Snakefile.
    Raises:
        WorkflowError: the config, a file that it names or a frozen run is wrong.
    """
    environment.prepare(ROOT)
    # The objects of a large DAG are kept to the end. With default thresholds, garbage collection
    # took a fifth of the processor time for 1,300 jobs (9.1 s; 7.3 s with these).
    gc.set_threshold(200_000, 20, 100)
    _check_prefix(workflow)
    cache = workflow.workflow_settings.cache
    with stopping():
        config = config_files.layered([config])
        settings = load_config(config)
        build = Build(
            settings,
            config,
            cores=workflow.resource_settings.cores,
            is_shared=cache is not None,
        )
        if build.is_shared:
            # A key of `--cache` describes how a file is made. If that gave another file on another
            # day or machine, both would share one key.
            shared_cache.check(settings, build.made_runs, cache)

    def remote(url: str) -> Any:  # untyped: an input of Snakemake's
        """A file on storage, by its storage plugin."""
        return getattr(storage, urls.plugin(url))(url)

    user_files = UserFiles(build, remote)
    user_files.look_for_all()
    links, params = Links(build), Params(build)
    releases = Releases(build, params, remote)
    releases.check_frozen()
    resources, gates = Resources(build), Gates(build, workflow)
    targets = Targets(build, links, remote)
    return settings, build, user_files, links, params, resources, gates, releases, targets


def _check_prefix(workflow: Any) -> None:  # untyped: Snakemake's
    """Refuse a module prefix: stages get the name of the results folder as an argument."""
    if workflow.modifier.path_modifier.replace_prefix("results/report") != "results/report":
        raise WorkflowError(
            "a module with a prefix is not supported\n"
            "  where:    the Snakefile that takes this workflow as a module\n"
            "  to fix:   leave out `prefix` and `replace_prefix`; --directory puts the results"
            " elsewhere"
        )
