# What the rules of gates and those that follow them share; no rules. Why: workflow_scripts/orchestration/gates.py.
from snakemake.io import IOFile

from workflow_scripts.orchestration.gates import Gate

TOKENS_GATE = Gate(
    "results/data/{dataset}/{model}/tokens/check.json",
    CONFIG.evaluation.gates.tokens.model_dump_json(),
    output_version("tokens/check_tokens"),
)
MERGED_GATE = Gate(
    "results/runs/{run}/merged_check.json",
    CONFIG.evaluation.gates.merge.model_dump_json(),
    output_version("merge/check_merged"),
)
GGUF_GATE = Gate(
    "results/runs/{run}/gguf_check.json",
    CONFIG.evaluation.gates.gguf.model_dump_json(),
    output_version("quantize/check_gguf"),
)


def last_attempt(gate):
    """A gate's param that changes until it passes."""

    def recorded(path):
        return workflow.persistence.params(IOFile(path))

    return lambda wildcards: gate.last_attempt(dict(wildcards.items()), recorded)


def ancient_verdict(gate):
    """A run's verdict as input of what follows, which a verdict asked for again does not re-run."""
    return ancient(of_run(gate.verdict))


def gate_samples():
    """What the figures of gates in reports and releases depend on; tolerances change none of them."""
    tolerances = {"merge": {"perplexity_increase_fraction"}, "gguf": {"kl_divergence_nats"}}
    samples = CONFIG.evaluation.gates.model_dump(include=set(tolerances))
    for gate, keys in tolerances.items():
        for key in keys:
            del samples[gate][key]
    return json.dumps(samples | {"versions": [MERGED_GATE.version, GGUF_GATE.version]})


def look_again_after_gates():
    """Make checkpoints of the gates that run again over finished work."""
    places = [
        {"run": name, "dataset": run.dataset, "model": run.model}
        for name, run in CONFIG.runs.items()
        if not CONFIG.is_frozen(name)
    ]
    for gate, rules_of_gate in (
        (TOKENS_GATE, ["check_tokens"]),
        (MERGED_GATE, ["check_merged", "check_fetched_merged"]),
        (GGUF_GATE, ["check_gguf"]),
    ):
        if gate.judges_again(places):
            for name in rules_of_gate:
                workflow.get_rule(name).is_checkpoint = True
