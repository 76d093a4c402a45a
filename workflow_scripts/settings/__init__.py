"""Typed settings that validate the config, document it, and parse the settings of a stage.

An attribute's docstring is the option's documentation. `config/config.schema.json` and
`docs/options.md` are made from it (`make schema`; a test fails if they differ). Unknown keys, wrong
types and impossible combinations raise `SettingsError` before any job runs. Each module holds one
table of the config; other rooms import from here.
"""

from workflow_scripts.settings.config import (
    RUN_TABLES as RUN_TABLES,
    Config as Config,
    load_config as load_config,
    settings_from_json as settings_from_json,
)
from workflow_scripts.settings.datasets import (
    CleanDatasetSettings as CleanDatasetSettings,
    CleaningSettings as CleaningSettings,
    DatasetSettings as DatasetSettings,
    DecontaminationSettings as DecontaminationSettings,
    DemoDatasetSettings as DemoDatasetSettings,
    NearDuplicateSettings as NearDuplicateSettings,
    PreviewSettings as PreviewSettings,
    ReadingSettings as ReadingSettings,
    RenderingSettings as RenderingSettings,
    SourceSettings as SourceSettings,
)
from workflow_scripts.settings.errors import (
    SettingsError as SettingsError,
)
from workflow_scripts.settings.evaluation import (
    ContextSettings as ContextSettings,
    EvaluationSettings as EvaluationSettings,
    GateSettings as GateSettings,
    GgufGateSettings as GgufGateSettings,
    InferenceSettings as InferenceSettings,
    MergeBaseGateSettings as MergeBaseGateSettings,
    MergeGateSettings as MergeGateSettings,
    RecallSettings as RecallSettings,
    SampleSettings as SampleSettings,
    TaskSettings as TaskSettings,
    TokensGateSettings as TokensGateSettings,
)
from workflow_scripts.settings.export import (
    IGNORE_IMATRIX as IGNORE_IMATRIX,
    NEED_IMATRIX as NEED_IMATRIX,
    TENSORS_NEED_IMATRIX as TENSORS_NEED_IMATRIX,
    AwqSettings as AwqSettings,
    GgufSettings as GgufSettings,
    ImatrixSettings as ImatrixSettings,
    MixSettings as MixSettings,
    PushSettings as PushSettings,
    QuantizationType as QuantizationType,
    StorageSettings as StorageSettings,
    TensorType as TensorType,
)
from workflow_scripts.settings.fields import (
    HUB_ID as HUB_ID,
    Name as Name,
    is_local as is_local,
)
from workflow_scripts.settings.models import (
    ModelSettings as ModelSettings,
    RandomModelSettings as RandomModelSettings,
    RopeScalingSettings as RopeScalingSettings,
    TokenizerVersion as TokenizerVersion,
    TransplantSettings as TransplantSettings,
)
from workflow_scripts.settings.reference_page import (
    config_schema as config_schema,
    option_tables as option_tables,
)
from workflow_scripts.settings.runs import (
    RunSettings as RunSettings,
)
from workflow_scripts.settings.training import (
    PackingSettings as PackingSettings,
    RecipeSettings as RecipeSettings,
    TrainingSettings as TrainingSettings,
)
