# Objects that the rules of all rooms use, and wildcard constraints; no rules.
# Only functions and modules, under names that do not collide with Snakemake's own.
from workflow_scripts.handover import chain as measured_chain
from workflow_scripts.orchestration.build import any_of, flagged, output_version
from workflow_scripts.orchestration.resources import growing, memory_of_models
from workflow_scripts.orchestration.start import start

(
    CONFIG,
    BUILD,
    USER_FILES,
    LINKS,
    PARAMS,
    RESOURCES,
    GATES,
    RELEASES,
    TARGETS,
) = start(workflow, config, storage)


wildcard_constraints:
    place=BUILD.any_place,
    link=any_of(BUILD.links),
    model=any_of(CONFIG.models),
    dataset=any_of(CONFIG.datasets),
    packing=any_of(CONFIG.packings),
    source=any_of(BUILD.hub_sources),
    run=BUILD.any_run_of(CONFIG.runs),
    text=any_of(CONFIG.evaluation.texts),
    quant=any_of(BUILD.quantizations),
