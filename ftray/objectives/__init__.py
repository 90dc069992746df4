"""What is optimised: one file per family, one row in OBJECTIVES."""

from ftray.objectives.labels import Labels
from ftray.objectives.language import Language
from ftray.objectives.objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": Language,
    "pretrain": Language,
    "classification": Labels,
    "regression": Labels,
}
