"""What ZeRO 3 makes different for whoever reads or writes a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def whole(parameter: Any) -> contextlib.AbstractContextManager:
    """Inside, a parameter that ZeRO 3 has sharded is whole, and what is written to it goes back to the shards."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Inside, `from_pretrained` loads whole weights even where ZeRO 3 would have them sharded while loading."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference
