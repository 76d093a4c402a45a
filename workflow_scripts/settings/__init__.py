"""The config, once: typed settings that validate it, document it, and parse what a stage is handed.

An attribute's docstring is the option's documentation: `config/config.schema.json` and the table in
`config/README.md` are made from it (`make schema`; a test fails when they drift). Unknown keys,
wrong types and impossible combinations raise `SettingsError` before any job runs. A module a table
of the config; everyone else imports from here.
"""

from workflow_scripts.settings.config import (
    RUN_TABLES,
    Config,
    load_config,
    settings_from_json,
)
from workflow_scripts.settings.datasets import (
    CleanDatasetSettings,
    CleaningSettings,
    DatasetSettings,
    DecontaminationSettings,
    DemoDatasetSettings,
    NearDuplicateSettings,
    PreviewSettings,
    ReadingSettings,
    RenderingSettings,
    SourceSettings,
)
from workflow_scripts.settings.errors import (
    SettingsError,
)
from workflow_scripts.settings.evaluation import (
    ContextSettings,
    EvaluationSettings,
    GateSettings,
    GgufGateSettings,
    InferenceSettings,
    MergeBaseGateSettings,
    MergeGateSettings,
    RecallSettings,
    SampleSettings,
    TaskSettings,
    TokensGateSettings,
)
from workflow_scripts.settings.export import (
    IGNORE_IMATRIX,
    NEED_IMATRIX,
    TENSORS_NEED_IMATRIX,
    AwqSettings,
    GgufSettings,
    ImatrixSettings,
    MixSettings,
    PushSettings,
    QuantizationType,
    StorageSettings,
    TensorType,
)
from workflow_scripts.settings.fields import (
    HUB_ID,
    Name,
    is_local,
)
from workflow_scripts.settings.models import (
    ModelSettings,
    RandomModelSettings,
    RopeScalingSettings,
    TransplantSettings,
)
from workflow_scripts.settings.reference_page import (
    config_schema,
    option_tables,
)
from workflow_scripts.settings.runs import (
    RunSettings,
)
from workflow_scripts.settings.training import (
    PackingSettings,
    RecipeSettings,
    TrainingSettings,
)

__all__ = [
    "HUB_ID",
    "IGNORE_IMATRIX",
    "NEED_IMATRIX",
    "RUN_TABLES",
    "TENSORS_NEED_IMATRIX",
    "AwqSettings",
    "CleanDatasetSettings",
    "CleaningSettings",
    "Config",
    "ContextSettings",
    "DatasetSettings",
    "DecontaminationSettings",
    "DemoDatasetSettings",
    "EvaluationSettings",
    "GateSettings",
    "GgufGateSettings",
    "GgufSettings",
    "ImatrixSettings",
    "InferenceSettings",
    "MergeBaseGateSettings",
    "MergeGateSettings",
    "MixSettings",
    "ModelSettings",
    "Name",
    "NearDuplicateSettings",
    "PackingSettings",
    "PreviewSettings",
    "PushSettings",
    "QuantizationType",
    "ReadingSettings",
    "RecallSettings",
    "RecipeSettings",
    "RenderingSettings",
    "RandomModelSettings",
    "RopeScalingSettings",
    "RunSettings",
    "SampleSettings",
    "SettingsError",
    "SourceSettings",
    "StorageSettings",
    "TaskSettings",
    "TensorType",
    "TokensGateSettings",
    "TrainingSettings",
    "TransplantSettings",
    "config_schema",
    "is_local",
    "load_config",
    "option_tables",
    "settings_from_json",
]
