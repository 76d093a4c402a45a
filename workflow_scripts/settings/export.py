"""`gguf`, `awq`, `retention`, `push`, `storage`: formats of a merged model, and where they go."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from workflow_scripts.settings.errors import did_you_mean
from workflow_scripts.settings.fields import Count, Name, Settings

# Types that llama.cpp's quantizer makes besides F16, from large to small.
QuantizationType = Literal[
    "F32", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_1", "Q4_K_M", "Q4_K_S",
    "IQ4_NL", "Q4_0", "MXFP4_MOE", "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S",
    "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "Q2_0", "IQ2_XXS", "TQ2_0",
    "IQ1_M", "TQ1_0", "IQ1_S", "Q1_0",
]  # fmt: skip
# Types of a single tensor.
TensorType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "IQ4_NL", "Q4_0",
    "MXFP4", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "Q2_0", "IQ2_XXS",
    "TQ2_0", "IQ1_M", "TQ1_0", "IQ1_S", "Q1_0",
]  # fmt: skip
# Types that llama.cpp's quantizer refuses to make without an importance matrix: of a file (which
# has tensors of the second set), and of a tensor.
# Source: `tensor_requires_imatrix` in llama-quant.cpp.
NEED_IMATRIX = frozenset(
    {"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
)
TENSORS_NEED_IMATRIX = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
# Types of files and tensors that an importance matrix does not change. Source: ggml-quants.c.
IGNORE_IMATRIX = frozenset(
    {"F32", "F16", "BF16", "Q8_0", "MXFP4_MOE", "MXFP4", "TQ2_0", "TQ1_0", "Q2_0", "Q1_0"}
)


class ImatrixSettings(Settings):
    """`gguf.imatrix`: the importance matrix, which says which weights a quantization should keep
    most exact."""

    use: Literal["always", "auto", "never"] = "always"
    """`always`: for every quantization that it changes; `auto`: only for types that need one;
    `never`: for none, and types that need one are refused."""
    n_tokens: Count = 51_200
    """Tokens that it is computed on: of the chats of the training split, and as many of each file.
    llama.cpp's practice is 100 chunks of 512."""
    files: list[str] = []
    """Text files to compute it on, besides the chats."""


class MixSettings(Settings):
    """`gguf.mixes.<name>`: a quantization in which some tensors have other types; built if
    `quantizations` names it."""

    type: QuantizationType
    """Type of the tensors that the other keys do not name."""
    output: TensorType | None = None
    """Type of the output layer; null is what llama.cpp takes for `type`."""
    token_embd: TensorType | None = None
    """Type of the token embeddings; null is what llama.cpp takes for `type`."""
    tensors: dict[str, TensorType] = {}
    """Types of tensors by a regular expression in their names: `{attn_v: Q8_0,
    'blk\\.[01]\\.ffn_down': Q6_K}`; the first expression that matches counts."""

    @model_validator(mode="after")
    def _can_be_made(self) -> MixSettings:
        for key in ("output", "token_embd"):
            found = getattr(self, key)
            # llama.cpp computes no importance matrix for these two.
            if found in TENSORS_NEED_IMATRIX:
                raise ValueError(
                    f"{key}: {found} needs an importance matrix, and llama.cpp computes none for"
                    " this tensor"
                )
        if self.tensors and self.type in ("F32", "BF16"):
            raise ValueError(f"tensors: llama.cpp accepts none with `type: {self.type}`")
        for pattern in self.tensors:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"tensors: {pattern!r} is not a regular expression: {error}"
                ) from None
        return self

    @property
    def needs_imatrix(self) -> bool:
        """llama.cpp cannot make it without an importance matrix."""
        return self.type in NEED_IMATRIX or not TENSORS_NEED_IMATRIX.isdisjoint(
            self.tensors.values()
        )

    @property
    def takes_imatrix(self) -> bool:
        """An importance matrix changes it."""
        return not IGNORE_IMATRIX.issuperset({self.type, *self.tensors.values()})


def _is_made(name: object, info: ValidationInfo) -> object:
    """Check a name of `gguf.quantizations`: a type, or a mix."""
    mixes, imatrix = info.data.get("mixes"), info.data.get("imatrix")
    if mixes is None or imatrix is None:  # they have errors of their own
        return name
    known = [*get_args(QuantizationType), *mixes]
    if name not in known:
        raise ValueError(
            f"found {name!r}, expected a type of llama.cpp's or an entry of gguf.mixes"
            f" ({did_you_mean(str(name), known)})"
        )
    mix = mixes.get(name) or MixSettings.model_validate({"type": name})
    if imatrix.use == "never" and mix.needs_imatrix:
        raise ValueError(
            f"found {name!r}, which llama.cpp makes only with an importance matrix;"
            " set gguf.imatrix.use: auto"
        )
    return name


Quantization = Annotated[QuantizationType | Name, BeforeValidator(_is_made)]


class GgufSettings(Settings):
    """`gguf`: GGUF files of the merged model."""

    # These two come first because the check of `quantizations` reads them.
    mixes: dict[Name, MixSettings] = {}
    """Quantizations of your own, by name: `{Q4_K_L: {type: Q4_K_M, output: Q8_0, token_embd:
    Q8_0}}`."""
    imatrix: ImatrixSettings = ImatrixSettings()
    """The importance matrix of the quantizations."""
    quantizations: Annotated[list[Quantization], Field(min_length=1)] = ["Q8_0", "Q4_K_M"]
    """llama.cpp quantization types, and names of `mixes`. F16 is always made, as their source."""
    quantized_by: str | None = None
    """User or organization that the files and the model card name as their maker."""

    @model_validator(mode="after")
    def _each_is_one(self) -> GgufSettings:
        if len(set(self.quantizations)) != len(self.quantizations):
            raise ValueError("quantizations: a type is named twice")
        # Types, and the other links of the chain, whose files lie in the same folder.
        taken = {"F16", "adapter", "merged", "awq", *get_args(QuantizationType)} & self.mixes.keys()
        if taken:
            raise ValueError(f"mixes: the name {min(taken)!r} is taken; choose another")
        return self

    def mix(self, name: str) -> MixSettings:
        """The mix of that name, or a mix that is the plain type."""
        return self.mixes.get(name) or MixSettings.model_validate({"type": name})

    def uses_imatrix(self, name: str) -> bool:
        """True if a quantization is made with the importance matrix."""
        mix = self.mix(name)
        return mix.needs_imatrix or (self.imatrix.use == "always" and mix.takes_imatrix)


class RetentionSettings(Settings):
    """`retention`: which large intermediate files stay when no step needs them any more. A file
    that was removed is made again if a new step needs it. Figures, adapters and releases always
    stay."""

    merged: bool = True
    """Keep merged models in 16 bits (14.5 GB for a 7B)."""
    f16: bool = True
    """Keep F16 GGUFs (of the same size). Without this, releases have none."""


class AwqSettings(Settings):
    """`awq`: the merged model in AWQ's 4 bits too, for engines that serve such a folder (vLLM,
    SGLang)."""

    use: bool = False
    """Make it for every run in `build`, and score it as a link of the chain."""
    group_size: Literal[32, 64, 128] = 128
    """Weights that share a scale and a zero point; smaller groups are more precise and take more
    bytes."""
    n_tokens: Count = 65_536
    """Tokens of the training split that calibrate it; AWQ's practice is 128 × 512."""
    sequence_tokens: Count = 512
    """Longest piece of a chat for calibration, tokens; never longer than the window."""


class PushSettings(Settings):
    """`push`: releases on the Hugging Face Hub (`snakemake push_release`)."""

    owner: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """User or organization. The release of a run goes to the repository `owner/<run>-GGUF`."""
    private: bool = True
    """Make new repositories private."""
    dry_run: bool = True
    """List what would be uploaded, and upload nothing."""


class StorageSettings(Settings):
    """`storage`: releases on S3-compatible storage (`snakemake store`)."""

    releases: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://[^{}*?]+[^{}*?/]$")] | None = None
    """URL of a folder (`s3://bucket/folder`). Each run's release goes to a folder there with the
    run's name."""
