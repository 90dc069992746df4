"""What is optimised: one file per family, one row in OBJECTIVES."""

from ftray.config.schema import Feature, Method
from ftray.objectives.distill import Distill
from ftray.objectives.features import FeatureLabels
from ftray.objectives.grpo import Grpo
from ftray.objectives.labels import Labels
from ftray.objectives.language import Language
from ftray.objectives.objective import Objective
from ftray.objectives.ppo import Ppo
from ftray.objectives.preferences import Dpo, Kto, Orpo
from ftray.objectives.reward_model import RewardModel
from ftray.objectives.rloo import Rloo
from ftray.objectives.tags import Tags

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": Language,
    "pretrain": Language,
    "distill": Distill,
    "dpo": Dpo,
    "orpo": Orpo,
    "kto": Kto,
    "reward": RewardModel,
    "grpo": Grpo,
    "rloo": Rloo,
    "ppo": Ppo,
    "classification": Labels,
    "regression": Labels,
    "token_classification": Tags,
}


def objective_for(kind: str, method: Method) -> type[Objective]:
    """The row of OBJECTIVES, unless the method decides what an example is."""
    return FeatureLabels if isinstance(method, Feature) else OBJECTIVES[kind]
