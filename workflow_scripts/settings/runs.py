"""`runs`: what is combined, or begun with."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from workflow_scripts.settings.fields import HUB_ID, Settings, is_local


class RunSettings(Settings):
    """`runs.<name>`: model × dataset × packing × recipe, each the name of an entry above. A run
    with an `adapter` or a `merged` model of yours is not trained, but exported and measured."""

    model: str
    """Name of an entry of `models`; of an adapter or merged model, the base that it was made of."""
    dataset: str
    """Name of an entry of `datasets`; what is not trained is calibrated, gated and scored on it."""
    packing: str | None = None
    """Name of an entry of `packings`; training needs one."""
    recipe: str | None = None
    """Name of an entry of `recipes`; training needs one."""
    adapter: str | None = None
    """An adapter that is there already: a folder (absolute, or beginning with `.` or `~`) or a Hub
    id."""
    merged: str | None = None
    """A fine-tuned model that is there already, whole: a folder or a Hub id."""
    revision: str | None = None
    """Commit, tag or branch of an `adapter` or `merged` model on the Hub."""
    precision: Literal["native", "int8", "nf4"] = "native"
    """How the base of an `adapter` was loaded when it was trained: in its own 16 bits, in 8 bits,
    or in 4 (QLoRA)."""
    merge_base: Literal["original", "dequantized", "auto"] = "original"
    """What an adapter of `method: qlora`, or of `precision: nf4`, is merged into: the `original`
    16-bit weights; the 4-bit ones it was trained against, `dequantized`; `auto` measures both on
    validation text and keeps the better (`choose_merge_base`)."""

    @model_validator(mode="after")
    def _one_beginning(self) -> RunSettings:
        given = self.adapter or self.merged
        needed = ("packing", "recipe")
        if self.adapter and self.merged:
            raise ValueError("found both `adapter` and `merged`, expected one of them")
        if given is None:
            missing = [key for key in needed if getattr(self, key) is None]
            if missing:
                raise ValueError("\n".join(f"{key}: missing" for key in missing))
        elif any(getattr(self, key) is not None for key in needed):
            key = "adapter" if self.adapter else "merged"
            raise ValueError(f"found `packing` or `recipe` beside `{key}`: nothing is trained")
        elif not (is_local(given) or HUB_ID.fullmatch(given)):
            raise ValueError(f"{given!r} is neither a Hub id (owner/name) nor a folder (./name)")
        if self.revision and (given is None or is_local(given)):
            raise ValueError("`revision` belongs to an adapter or merged model on the Hub")
        if self.precision != "native" and not self.adapter:
            raise ValueError("`precision` belongs to an `adapter`; a recipe's is its `method`")
        if self.merged and self.merge_base != "original":
            raise ValueError("`merge_base`: a merged model is not merged again")
        return self

    @property
    def is_trained(self) -> bool:
        """Whether the run makes its adapter itself."""
        return self.recipe is not None
