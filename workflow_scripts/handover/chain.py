"""The links of the measured chain, each declared once: base, adapter, merged model, GGUFs.

A link is one state of the model on its way from the base to the smallest file. Rules ask `Link`
which files make it up and where its measurements go. Report programs read the paths from a run's
`chain.json` (`write_chain`) and never put one together.

A further link is an entry of `links`, and the rule that makes its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from workflow_scripts.handover.record import Record
from workflow_scripts.settings import RunSettings
from workflow_scripts.settings.fields import Settings

Engine = Literal["transformers", "llama.cpp"]
Measurement = Literal[
    "scores", "divergence", "speed", "text", "context", "answers", "tasks", "references"
]
TaskKind = Literal["tasks", "references"]

FILES: dict[Measurement, str] = {
    "scores": "results/{place}/{link}.json",
    "divergence": "results/{place}/{link}.divergence.json",
    "speed": "results/{place}/{link}.inference.json",
    "text": "results/{place}/texts/{text}/{link}.json",
    "context": "results/{place}/{link}.context.json",
    "answers": "results/{place}/{link}.answers.json",
    "tasks": "results/{place}/{link}.tasks.json",
    "references": "results/{place}/{link}.references.json",
}
"""Where each measurement of a link is written. Every rule that measures has one of these as its
output."""
RUN_PLACE = "runs/{run}/evaluation"
BASE_PLACE = "evaluation/{model}/{dataset}"
MODEL_PLACE = "evaluation/{model}"
"""Folder of the measurements of a base that do not depend on the run's dataset."""
WITHOUT_DATASET: tuple[Measurement, ...] = ("text", "tasks")


@dataclass(frozen=True)
class Link:
    """One state of the model: how it is loaded, what is measured of it, how it is drawn.

    The patterns of paths have the wildcards {run}, {model}, {dataset} and {link}.
    """

    name: str
    """Name in files and rules: `base-nf4`, `Q4_K_M`."""
    title: str
    """Name in reports."""
    engine: Engine
    weights: str
    """Pattern of its folder or, for llama.cpp, of its GGUF."""
    measured: frozenset[Measurement]
    """Measurements that can be made of it."""
    adapter: str | None = None
    """Pattern of the adapter that is applied to the weights as they are loaded."""
    precision: str | None = None
    """Precision of the weights in memory. `trained`: as the adapter was trained. None: as
    stored."""
    gate: str | None = None
    """Pattern of the verdict that comes before any measurement."""
    source: str | None = None
    """The link that it is made from, if that is not the one before it in the chain."""
    is_of_model: bool = False
    """True if it is measured once for all runs of a model and dataset."""
    is_aside: bool = False
    """True if no other link is made from it; figures draw it apart."""
    is_product: bool = False
    """True if people run it, so that its size and speed matter."""

    def place(self, measurement: Measurement) -> str:
        """Pattern of the folder of a measurement."""
        if not self.is_of_model:
            return RUN_PLACE
        return MODEL_PLACE if measurement in WITHOUT_DATASET else BASE_PLACE

    def file(self, measurement: Measurement, *, text: str = "") -> str:
        """Pattern of the file of a measurement."""
        return FILES[measurement].format(place=self.place(measurement), link=self.name, text=text)


def links(quantizations: Sequence[str]) -> list[Link]:
    """Every link that there can be, in the order of the chain.

    Args:
        quantizations: types of GGUF besides F16, from the largest to the smallest file.
    """
    questions: frozenset[Measurement] = frozenset(
        ("text", "context", "answers", "tasks", "references")
    )
    merged_gate, gguf_gate = (
        f"results/runs/{{run}}/{name}_check.json" for name in ("merged", "gguf")
    )
    base = "results/models/{model}/checkpoint"
    gguf = "results/runs/{run}/gguf/{run}-{link}.gguf"
    return [
        Link(
            name="base",
            title="base",
            engine="transformers",
            weights=base,
            measured=questions | {"scores"},
            precision="native",
            is_of_model=True,
        ),
        Link(
            name="base-F16",
            title="base F16",
            engine="llama.cpp",
            weights="results/models/{model}/gguf/{model}-F16.gguf",
            measured=questions | {"scores"},
            is_of_model=True,
        ),
        Link(
            name="base-nf4",
            title="base NF4",
            engine="transformers",
            weights=base,
            measured=frozenset({"scores"}),
            precision="nf4",
            source="base",
            is_of_model=True,
        ),
        Link(
            name="adapter",
            title="adapter",
            engine="transformers",
            weights=base,
            measured=frozenset({"scores", "speed"}),
            adapter="results/runs/{run}/adapter/adapter_model.safetensors",
            precision="trained",
        ),
        Link(
            name="merged",
            title="merged",
            engine="transformers",
            weights="results/runs/{run}/merged",
            measured=questions | {"scores", "speed"},
            gate=merged_gate,
        ),
        Link(
            name="F16",
            title="F16",
            engine="llama.cpp",
            weights=gguf,
            measured=questions | {"scores", "speed"},
            gate=gguf_gate,
            is_product=True,
        ),
        *(
            Link(
                name=quantization,
                title=quantization,
                engine="llama.cpp",
                weights=gguf,
                measured=questions | {"scores", "speed", "divergence"},
                gate=gguf_gate,
                source="F16",
                is_product=True,
            )
            for quantization in quantizations
        ),
        # Its speed is not measured: what runs here are its weights, without AWQ's kernels.
        Link(
            name="awq",
            title="AWQ",
            engine="transformers",
            weights="results/runs/{run}/awq",
            measured=frozenset({"scores"}),
            source="merged",
            is_aside=True,
            is_product=True,
        ),
    ]


class ChainSettings(Settings):
    """Settings that decide the chain of a run."""

    run: RunSettings
    quantizations: tuple[str, ...]
    awq: bool = False
    base_gguf: bool = False
    texts: tuple[str, ...] = ()
    """Names of the texts of `evaluation.texts`."""


class LinkFiles(Record):
    """Paths of the measurements of a link; null for one that is never made. The files of
    `context`, `answers` and `tasks` are there if the config asked for them."""

    name: str
    title: str
    """Name in reports."""
    source: str | None
    """The link that it is made from; null for the base."""
    is_aside: bool
    """True if no other link is made from it; figures draw it apart."""
    is_product: bool
    """True if people run it, so that its size and speed matter."""
    scores: str
    token_scores: str
    divergence: str | None
    speed: str | None
    texts: dict[str, str]
    """By the name of the text."""
    context: str | None
    answers: str | None
    tasks: dict[TaskKind, str]
    """Scores in tasks. Scores of every document are next to it, in a file of the same name with
    the ending `.parquet`."""


class Chain(Record):
    """`chain.json`: a run's links and where everything measured of it is, as paths from the working
    directory."""

    run: str
    settings: RunSettings
    """`runs.<name>` of the config."""
    facts: str
    cleaning_report: str
    packing_report: str | None
    """Null where the run began with an adapter or a merged model, as the next three are."""
    history: str | None
    training_manifest: str | None
    memory_plan: str | None
    merge_base: str | None
    """Null where the config names the base to merge into."""
    merged_check: str
    gguf_check: str
    links: tuple[LinkFiles, ...]
    """From the base to the smallest file; links aside come last."""

    @property
    def base(self) -> LinkFiles:
        return self.links[0]

    def link(self, name: str) -> LinkFiles:
        return next(link for link in self.links if link.name == name)


def links_of(settings: ChainSettings) -> list[Link]:
    """The links of a run. A model that was merged elsewhere comes without an adapter."""
    left_out = {"adapter"} if settings.run.merged else set()
    left_out |= set() if settings.awq else {"awq"}
    left_out |= set() if settings.base_gguf else {"base-F16"}
    return [link for link in links(settings.quantizations) if link.name not in left_out]


def chain_of(run: str, settings: ChainSettings) -> Chain:
    """Every path of a run that a report can ask for."""
    names = {"run": run, "model": settings.run.model, "dataset": settings.run.dataset}
    folder, data = f"results/runs/{run}", f"results/data/{settings.run.dataset}"
    of_run = links_of(settings)
    sources = [None, *(link.name for link in of_run)]
    is_trained = settings.run.is_trained
    return Chain(
        run=run,
        settings=settings.run,
        facts=f"results/models/{settings.run.model}/facts.json",
        cleaning_report=f"{data}/clean/cleaning_report.json",
        packing_report=(
            f"{data}/{settings.run.model}/{settings.run.packing}/packing_report.json"
            if is_trained
            else None
        ),
        history=f"{folder}/adapter/history.json" if is_trained else None,
        training_manifest=f"{folder}/adapter/training_manifest.json" if is_trained else None,
        memory_plan=f"{folder}/memory_plan.json" if is_trained else None,
        merge_base=f"{folder}/merge_base.json" if settings.run.merge_base == "auto" else None,
        merged_check=f"{folder}/merged_check.json",
        gguf_check=f"{folder}/gguf_check.json",
        links=tuple(
            _files(link, link.source or before, names, settings)
            for link, before in zip(of_run, sources, strict=False)
        ),
    )


def _files(
    link: Link, source: str | None, names: dict[str, str], settings: ChainSettings
) -> LinkFiles:
    def path(measurement: Measurement, *, text: str = "") -> str | None:
        if measurement not in link.measured:
            return None
        return link.file(measurement, text=text).format(**names)

    scores = link.file("scores").format(**names)
    texts = {text: path("text", text=text) for text in settings.texts}
    tasks = {kind: path(kind) for kind in get_args(TaskKind)}
    return LinkFiles(
        name=link.name,
        title=link.title,
        source=source,
        is_aside=link.is_aside,
        is_product=link.is_product,
        scores=scores,
        token_scores=token_scores_beside(scores),
        divergence=path("divergence"),
        speed=path("speed"),
        texts={text: file for text, file in texts.items() if file},
        context=path("context"),
        answers=path("answers"),
        tasks={kind: file for kind, file in tasks.items() if file},
    )


def token_scores_beside(scores: str) -> str:
    """Path of the loss of every token, a file next to the scores."""
    return f"{scores.removesuffix('.json')}.tokens.parquet"


def samples_beside(scores: str) -> str:
    """Path of the scores of every document, a file next to the scores of tasks."""
    return f"{scores.removesuffix('.json')}.parquet"
