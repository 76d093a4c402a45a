"""The config, once: typed settings that validate it, document it, and parse what a stage is handed.

An attribute's docstring is the option's documentation: `config/config.schema.json` and the table in
`config/README.md` are made from it (`make schema`; a test fails when they drift). Unknown keys,
wrong types and impossible combinations raise `SettingsError` before any job runs. A module a table
of the config; everyone else imports from here.
"""

from workflow_scripts.settings.config import (
    RUN_TABLES as RUN_TABLES,
)
from workflow_scripts.settings.config import (
    Config as Config,
)
from workflow_scripts.settings.config import (
    load_config as load_config,
)
from workflow_scripts.settings.config import (
    settings_from_json as settings_from_json,
)
from workflow_scripts.settings.datasets import (
    CleanDatasetSettings as CleanDatasetSettings,
)
from workflow_scripts.settings.datasets import (
    CleaningSettings as CleaningSettings,
)
from workflow_scripts.settings.datasets import (
    DatasetSettings as DatasetSettings,
)
from workflow_scripts.settings.datasets import (
    DecontaminationSettings as DecontaminationSettings,
)
from workflow_scripts.settings.datasets import (
    DemoDatasetSettings as DemoDatasetSettings,
)
from workflow_scripts.settings.datasets import (
    NearDuplicateSettings as NearDuplicateSettings,
)
from workflow_scripts.settings.datasets import (
    PreviewSettings as PreviewSettings,
)
from workflow_scripts.settings.datasets import (
    ReadingSettings as ReadingSettings,
)
from workflow_scripts.settings.datasets import (
    RenderingSettings as RenderingSettings,
)
from workflow_scripts.settings.datasets import (
    SourceSettings as SourceSettings,
)
from workflow_scripts.settings.errors import (
    SettingsError as SettingsError,
)
from workflow_scripts.settings.evaluation import (
    ContextSettings as ContextSettings,
)
from workflow_scripts.settings.evaluation import (
    EvaluationSettings as EvaluationSettings,
)
from workflow_scripts.settings.evaluation import (
    GateSettings as GateSettings,
)
from workflow_scripts.settings.evaluation import (
    GgufGateSettings as GgufGateSettings,
)
from workflow_scripts.settings.evaluation import (
    InferenceSettings as InferenceSettings,
)
from workflow_scripts.settings.evaluation import (
    MergeBaseGateSettings as MergeBaseGateSettings,
)
from workflow_scripts.settings.evaluation import (
    MergeGateSettings as MergeGateSettings,
)
from workflow_scripts.settings.evaluation import (
    RecallSettings as RecallSettings,
)
from workflow_scripts.settings.evaluation import (
    SampleSettings as SampleSettings,
)
from workflow_scripts.settings.evaluation import (
    TaskSettings as TaskSettings,
)
from workflow_scripts.settings.evaluation import (
    TokensGateSettings as TokensGateSettings,
)
from workflow_scripts.settings.export import (
    IGNORE_IMATRIX as IGNORE_IMATRIX,
)
from workflow_scripts.settings.export import (
    NEED_IMATRIX as NEED_IMATRIX,
)
from workflow_scripts.settings.export import (
    TENSORS_NEED_IMATRIX as TENSORS_NEED_IMATRIX,
)
from workflow_scripts.settings.export import (
    AwqSettings as AwqSettings,
)
from workflow_scripts.settings.export import (
    GgufSettings as GgufSettings,
)
from workflow_scripts.settings.export import (
    ImatrixSettings as ImatrixSettings,
)
from workflow_scripts.settings.export import (
    MixSettings as MixSettings,
)
from workflow_scripts.settings.export import (
    PushSettings as PushSettings,
)
from workflow_scripts.settings.export import (
    QuantizationType as QuantizationType,
)
from workflow_scripts.settings.export import (
    StorageSettings as StorageSettings,
)
from workflow_scripts.settings.export import (
    TensorType as TensorType,
)
from workflow_scripts.settings.fields import (
    HUB_ID as HUB_ID,
)
from workflow_scripts.settings.fields import (
    Name as Name,
)
from workflow_scripts.settings.fields import (
    is_local as is_local,
)
from workflow_scripts.settings.models import (
    ModelSettings as ModelSettings,
)
from workflow_scripts.settings.models import (
    RandomModelSettings as RandomModelSettings,
)
from workflow_scripts.settings.models import (
    RopeScalingSettings as RopeScalingSettings,
)
from workflow_scripts.settings.models import (
    TransplantSettings as TransplantSettings,
)
from workflow_scripts.settings.reference_page import (
    config_schema as config_schema,
)
from workflow_scripts.settings.reference_page import (
    option_tables as option_tables,
)
from workflow_scripts.settings.runs import (
    RunSettings as RunSettings,
)
from workflow_scripts.settings.training import (
    PackingSettings as PackingSettings,
)
from workflow_scripts.settings.training import (
    RecipeSettings as RecipeSettings,
)
from workflow_scripts.settings.training import (
    TrainingSettings as TrainingSettings,
)
