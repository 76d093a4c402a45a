"""`runs`: which model, dataset, packing and recipe are combined, or what a run begins with."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from workflow_scripts.settings.fields import HUB_ID, Settings, is_local


class RunSettings(Settings):
    """`runs.<name>`: model × dataset × packing × recipe, each the name of an entry above. A run
    with an `adapter` or `merged` model of yours is exported and measured, but not trained."""

    model: str
    """Name of an entry of `models`. For an adapter or merged model, the base that it was made
    from."""
    dataset: str
    """Name of an entry of `datasets`. A run that is not trained is calibrated, checked and scored
    on it."""
    packing: str | None = None
    """Name of an entry of `packings`; training needs one."""
    recipe: str | None = None
    """Name of an entry of `recipes`; training needs one."""
    adapter: str | None = None
    """An existing adapter: a folder (absolute, or beginning with `.` or `~`) or a Hub id."""
    merged: str | None = None
    """An existing fine-tuned model with all its weights: a folder or a Hub id."""
    revision: str | None = None
    """Commit, tag or branch of an `adapter` or `merged` model on the Hub."""
    precision: Literal["native", "int8", "nf4"] = "native"
    """Precision of the base when `adapter` was trained: its own 16 bits, 8 bits, or 4 bits
    (QLoRA)."""
    merge_base: Literal["original", "dequantized", "auto"] = "original"
    """Base that an adapter of `method: qlora` or `precision: nf4` is merged into: the `original`
    16-bit weights, or the 4-bit weights it was trained against, `dequantized`. `auto` measures both
    on validation text and takes the better one (`choose_merge_base`)."""

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
            raise ValueError(f"found `packing` or `recipe` with `{key}`: such a run is not trained")
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
        """True if the run trains its adapter itself."""
        return self.recipe is not None
