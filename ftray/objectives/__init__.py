"""What is optimised: one file per family, one row in OBJECTIVES."""

from ftray.objectives import language

OBJECTIVES = {"sft": language, "pretrain": language}
