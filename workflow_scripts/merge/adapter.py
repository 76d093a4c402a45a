"""The result of training on disk: for each weight it changes, how to compute the merged weight.

- LoRA, as PEFT saves it: W + s·B·A, s = alpha ÷ rank (arXiv:2106.09685) or alpha ÷ √rank
  (rsLoRA, arXiv:2312.03732); the first pattern that matches the end of a module's name gives its
  rank and alpha, as in PEFT.
- DoRA (arXiv:2402.09353): the same sum, each row scaled to the length that was trained.
- The experts of a mixture: one A and one B for all experts of a layer, the ranks of A stacked
  expert by expert, those of B interleaved (PEFT 0.21, `ParamWrapper`).
- Whole tensors: layers that were trained next to the adapter (`modules_to_save`), embeddings
  resized for new tokens, and every weight where `method: full` trained the model itself.

All arithmetic is float32.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from workflow_scripts import log
from workflow_scripts.log import StageError
from workflow_scripts.merge.adapter_config import EMBEDDINGS, AdapterConfig
from workflow_scripts.merge.tensor_names import Part
from workflow_scripts.models import tensors

PREFIX = "base_model.model."
FETCH_AGAIN = "fetch the adapter again, or save it again with PEFT"


class Factors(NamedTuple):
    """Places of A and B of a parameter in the file, and the name by which PEFT finds their rank."""

    stem: str
    pattern_name: str


class _OfThread(threading.local):
    """Values that an adapter keeps between two slabs, for each thread that merges."""

    part: Part | None = None
    factors: tuple[torch.Tensor, torch.Tensor]
    room: torch.Tensor = torch.empty(0)


class Adapter:
    """Merged weights, by the names of the model's parameters.

    Attributes:
        config: its adapter_config.json.
        targets: parameters that it changes.
        whole: those of them that it holds as whole tensors, which take the base's place.
        magnitudes: those of them whose rows DoRA scales to a trained length.
        keeps_ties: embeddings that are also the output layer were trained as one.
    Args:
        folder: adapter_config.json and adapter_model.safetensors.
    Raises:
        StageError: it is neither a LoRA nor a full fine-tune, has parts that are not merged here,
            or its file is damaged or lacks half of a pair.
    """

    def __init__(self, folder: Path) -> None:
        self.config = AdapterConfig(folder / "adapter_config.json")
        self._path = folder / "adapter_model.safetensors"
        self._headers = tensors.stored([self._path])
        tensors.check_types(self._headers)
        self._tensors = safe_open(self._path, framework="pt")
        self._factors: dict[str, Factors] = {}
        if self.config.is_full:
            self._whole = {name: name for name in self._headers}
        else:
            stems = sorted(
                name.removesuffix(".lora_A.weight")
                for name in self._headers
                if name.endswith(".lora_A.weight")
            )
            self._check_pairs(stems)
            self._find_factors(stems)
            self._whole = self._find_whole()
        self.targets: set[str] = self._factors.keys() | self._whole.keys()
        self.whole: set[str] = set(self._whole)
        self.magnitudes: set[str] = {
            name
            for name, factors in self._factors.items()
            if f"{factors.stem}.lora_magnitude_vector" in self._headers
        }
        # Embeddings saved because they were resized are tied; of `modules_to_save` each may have
        # been trained apart.
        self.keeps_ties: bool = self.config.keeps_ties or (
            EMBEDDINGS <= self.whole and not self.config.saves_modules()
        )
        self._own = _OfThread()

    def scale_of(self, part: Part) -> float:
        """alpha ÷ rank, or alpha ÷ √rank, of a parameter."""
        return self.config.scale(self._factors[part.parameter].pattern_name)

    def n_experts(self, parameter: str) -> int:
        """Number of experts whose ranks are stacked in a fused parameter's A."""
        stem, name = self._factors[parameter]
        return self._headers[f"{stem}.lora_A.weight"].shape[0] // self.config.rank(name)

    def delta(self, part: Part, rows: slice = slice(None)) -> torch.Tensor:
        """(rows, in) float32: s·B·A of a part.

        Valid until the thread's next call: the memory is reused, because the kernel clears new
        memory page by page, which would take longer than the product.
        """
        down, up = self.factors(part)
        up = up[rows]
        n_elements = len(up) * down.shape[1]
        if n_elements > len(self._own.room):
            self._own.room = torch.empty(n_elements)
        product = self._own.room[:n_elements].view(len(up), -1)
        torch.mm(up, down, out=product)
        return product.mul_(self.scale_of(part))

    def merged(self, part: Part, base: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Merged rows of a weight to which the adapter adds, float32; valid until the thread's next
        call.

        Args:
            part: one of `targets`, or a part of one, whose shape was checked.
            base: these rows in the base model; not written to.
        """
        weight = self.delta(part, rows).add_(base)
        if part.parameter not in self.magnitudes:
            return weight
        magnitude = f"{self._factors[part.parameter].stem}.lora_magnitude_vector"
        length = torch.linalg.norm(weight, dim=1)
        return (self._tensors.get_tensor(magnitude)[rows].float() / length)[:, None] * weight

    def shape(self, part: Part) -> tuple[int, ...]:
        """Shape that the part's weight must have in the base, except that embeddings may have
        grown.

        Raises:
            StageError: the adapter has too few experts.
        """
        if part.parameter in self._whole:
            shape = self._headers[self._whole[part.parameter]].shape
            if part.expert is None:
                return shape
            n_experts, n_rows, n_columns = shape
        else:
            n_rows, n_columns = self._outer_shape(self._factors[part.parameter].stem)
            n_experts = self.n_experts(part.parameter)
        if part.expert is not None and part.expert >= n_experts:
            raise self._misfit(part, f"{n_experts} experts", f"expert {part.expert}")
        return (n_rows if part.half is None else n_rows // 2, n_columns)

    def _outer_shape(self, stem: str) -> tuple[int, int]:
        """Shape of B·A."""
        up, down = (self._headers[f"{stem}.lora_{letter}.weight"].shape for letter in "BA")
        return up[0], down[1]

    def check_complete(self, parameters: set[str]) -> None:
        """Check that the file holds every module that the config names, in every layer.

        Args:
            parameters: of the base model.
        Raises:
            StageError: naming the first ten that are missing.
        """
        if self.config.is_full:
            tied = EMBEDDINGS if EMBEDDINGS & self.targets else set()
            named = {name for name in parameters - tied if not tensors.is_position_table(name)}
        else:
            named = {name for name in parameters if self.config.names(name)}
        missing = sorted(named - self.targets)
        if missing:
            shown = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
            raise StageError(
                "the adapter lacks modules that its adapter_config.json names",
                where=self._path,
                found=f"nothing for {len(missing)}: {shown}",
                expected="every weight of the base"
                if self.config.is_full
                else "target_modules,"
                " target_parameters and modules_to_save in every layer of layers_to_transform",
                to_fix=f"{FETCH_AGAIN}: file and config must belong together",
            )

    def _check_pairs(self, stems: list[str]) -> None:
        """
        Raises:
            StageError: an A has no B, or with DoRA no magnitudes; names the first ten.
        """
        needed = ["lora_B.weight"] + ["lora_magnitude_vector"] * self.config.uses_dora
        wanted = {f"{stem}.{name}" for stem in stems for name in needed}
        missing = sorted(wanted - self._headers.keys())
        if missing:
            raise StageError(
                "the adapter is not complete",
                where=self._path,
                found=f"no {', '.join(missing[:10])}",
                expected="lora_A and lora_B of every module, with DoRA its magnitudes too",
                to_fix=FETCH_AGAIN,
            )

    def _check_rank(self, factors: Factors) -> None:
        """
        Raises:
            StageError: A and B do not have the rank that the adapter's config says, or DoRA's
                magnitudes are not one per row.
        """
        stem = factors.stem
        where = f"{self._path}, {stem}"
        down, up = (self._headers[f"{stem}.lora_{name}.weight"].shape for name in "AB")
        rank = self.config.rank(factors.pattern_name)
        # The experts of a mixture are stacked.
        n_stacked = down[0] // rank if ".experts" in stem else 1
        if (len(down), len(up)) != (2, 2) or not down[0] == up[1] == rank * n_stacked:
            raise StageError(
                "the adapter's matrices do not have the rank that its adapter_config.json says",
                where=where,
                found=f"A {list(down)}, B {list(up)}",
                expected=f"rank {rank}: A [{rank}, in], B [out, {rank}]",
                to_fix="take file and config from the same adapter: its scale is alpha ÷ rank",
            )
        magnitudes = self._headers.get(f"{stem}.lora_magnitude_vector")
        if magnitudes is not None and magnitudes.shape != (up[0],):
            raise StageError(
                "the adapter does not have one magnitude per row",
                where=where,
                found=list(magnitudes.shape),
                expected=[up[0]],
                to_fix=FETCH_AGAIN,
            )

    def check_shape(self, part: Part, base: tuple[int, ...]) -> None:
        """
        Args:
            base: shape of the part in the base model.
        Raises:
            StageError: the adapter's shape is another.
        """
        found = self.shape(part)
        has_grown = part.parameter in EMBEDDINGS and found[0] > base[0] and found[1:] == base[1:]
        if found != base and not has_grown:
            raise self._misfit(part, found, base)

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the embeddings that the adapter holds whole; None where it holds none.

        Raises:
            StageError: embeddings and output layer differ.
        """
        sizes = {name: self.shape(Part(name))[0] for name in sorted(EMBEDDINGS & self.whole)}
        if len(set(sizes.values())) > 1:
            raise StageError(
                "the adapter's embeddings and its output layer differ in their number of rows",
                where=self._path,
                found=log.fields(sizes),
                expected="one size of the vocabulary",
            )
        return next(iter(sizes.values()), None)

    def factors(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) of a part, float32; each thread keeps the last pair."""
        if self._own.part == part:
            return self._own.factors
        stem, name = self._factors[part.parameter]
        down = self._tensors.get_tensor(f"{stem}.lora_A.weight").float()
        up = self._tensors.get_tensor(f"{stem}.lora_B.weight").float()
        if part.expert is not None:
            rank = self.config.rank(name)
            first = part.expert * rank
            down = down[first : first + rank]
            up = up.reshape(len(up), rank, -1)[:, :, part.expert]
        if part.half is not None:
            up = up.chunk(2)[part.half]
        self._own.part, self._own.factors = part, (down, up)
        return down, up

    def stored(self, part: Part, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of a part that was trained whole; no others are read, as the experts of a layer are
        gigabytes."""
        tensor = self._tensors.get_slice(self._whole[part.parameter])
        if part.expert is None:
            return tensor[rows]
        n_rows = tensor.get_shape()[1]
        first, end, _ = rows.indices(n_rows if part.half is None else n_rows // 2)
        offset = (part.half or 0) * (n_rows // 2)
        return tensor[part.expert, offset + first : offset + end]

    def _find_whole(self) -> dict[str, str]:
        """Parameter → tensor of the file that takes its place.

        Raises:
            StageError: naming tensors that belong neither to A and B nor to `modules_to_save`.
        """
        factored = {
            f"{factors.stem}.{name}"
            for factors in self._factors.values()
            for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        }
        others = {name.removeprefix(PREFIX): name for name in self._headers.keys() - factored}
        unknown = sorted(others[name] for name in others if not self.config.names_whole(name))
        if unknown:
            raise StageError(
                "the adapter holds tensors that are not merged here",
                where=self._path,
                found=", ".join(unknown[:10]),
                expected="lora_A, lora_B, lora_magnitude_vector, embeddings, or a module of"
                " modules_to_save",
            )
        return others

    def _find_factors(self, stems: list[str]) -> None:
        """Find A and B of each parameter, and check their rank."""
        experts: dict[str, list[str]] = {}
        for stem in stems:
            module = stem.removeprefix(PREFIX).replace(".base_layer", "")
            if module.endswith(".mlp.experts"):
                experts.setdefault(module, []).append(stem)
            else:
                # PEFT adapts the router as a parameter, all others as modules.
                name = f"{module}.weight" if module.endswith(".mlp.gate") else module
                self._factors[f"{module}.weight"] = Factors(stem, name)
        for module, pairs in experts.items():
            for fused, stem in zip(self._fused(pairs), pairs, strict=True):
                self._factors[f"{module}.{fused}"] = Factors(stem, f"{module}.{fused}")
        for factors in self._factors.values():
            self._check_rank(factors)

    def _fused(self, stems: list[str]) -> list[str]:
        """Names of the expert parameters that the pairs of A and B of a layer belong to.

        PEFT nests one parameter's pair in the other's and does not store their names. Shapes tell
        them apart: the input of down_proj is half as wide as the output of gate_up_proj.
        """
        named = self.config.expert_targets()
        if len(stems) == len(named) == 1:
            return list(named)
        shapes = [self._outer_shape(stem) for stem in stems]
        for order in (["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"]):
            shape = dict(zip(order, shapes, strict=False))
            if len(stems) == 2 and shape["gate_up_proj"] == (
                2 * shape["down_proj"][1],
                shape["down_proj"][0],
            ):
                return order
        raise StageError(
            "the adapter's experts do not have the shapes of a mixture",
            where=f"{self._path}, {stems[0]}",
            found=shapes,
            expected="(2 · ffn, hidden) and (hidden, ffn)",
        )

    def _misfit(self, part: Part, found: object, expected: object) -> StageError:
        return StageError(
            "the adapter does not fit the base model",
            where=f"{self._path}, {part.parameter}",
            found=found,
            expected=f"{expected}, as in the base",
            to_fix="take the model that the adapter was trained on",
        )
