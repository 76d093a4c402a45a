"""What Snakemake knows when it starts, and all that rules ask for, made of it."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

from snakemake.exceptions import WorkflowError

from workflow_scripts import urls
from workflow_scripts.log import StageError
from workflow_scripts.orchestration import environment, shared_cache
from workflow_scripts.orchestration.build import ROOT, Build
from workflow_scripts.orchestration.gates import Gates
from workflow_scripts.orchestration.links import Links
from workflow_scripts.orchestration.params import Params
from workflow_scripts.orchestration.releases import Releases
from workflow_scripts.orchestration.resources import Resources
from workflow_scripts.orchestration.targets import Targets
from workflow_scripts.orchestration.user_files import UserFiles
from workflow_scripts.settings import Config, config_files, load_config


class Orchestration(NamedTuple):
    """Names that rules use."""

    config: Config
    build: Build
    user_files: UserFiles
    links: Links
    params: Params
    resources: Resources
    gates: Gates
    releases: Releases
    targets: Targets


def start(
    workflow: Any,  # untyped: Snakemake's
    config: dict[str, Any],  # untyped: as Snakemake read it
    storage: Any,  # untyped: Snakemake's
) -> Orchestration:
    """
    Args:
        workflow, config, storage: the names that Snakemake gives to a Snakefile.
    Raises:
        WorkflowError: the config, a file that it names or a frozen run is not right.
    """
    environment.prepare(ROOT)
    # The objects of a large DAG stay: looking for garbage among them took a fifth of the processor
    # time for 1,300 jobs (9.1 s, 7.3 s so).
    gc.set_threshold(200_000, 20, 100)
    _check_prefix(workflow)
    cache = workflow.workflow_settings.cache
    try:
        config = config_files.layered([config])
        settings = load_config(config)
        build = Build(
            settings,
            config,
            cores=workflow.resource_settings.cores,
            is_shared=cache is not None,
        )
        if build.is_shared:
            # A key of `--cache` says how a file is made: where that gives another file on another
            # day or machine, it would stand for both.
            shared_cache.check(settings, build.made_runs, cache)
    except StageError as error:
        raise WorkflowError(str(error)) from None

    def remote(url: str) -> Any:  # untyped: an input of Snakemake's
        """A file on storage, by the plugin for it."""
        return getattr(storage, urls.plugin(url))(url)

    user_files = UserFiles(build, remote)
    user_files.look_for_all()
    links, params = Links(build), Params(build)
    releases = Releases(build, params, remote)
    releases.check_frozen()
    return Orchestration(
        config=settings,
        build=build,
        user_files=user_files,
        links=links,
        params=params,
        resources=Resources(build),
        gates=Gates(build, workflow),
        releases=releases,
        targets=Targets(build, links, remote),
    )


def _check_prefix(workflow: Any) -> None:  # untyped: Snakemake's
    """Stages are told the folder of results by its name."""
    if workflow.modifier.path_modifier.replace_prefix("results/report") != "results/report":
        raise WorkflowError(
            "a module with a prefix is not supported\n"
            "  where:    the Snakefile that takes this workflow as a module\n"
            "  to fix:   leave out `prefix` and `replace_prefix`; --directory has the results"
            " elsewhere"
        )
