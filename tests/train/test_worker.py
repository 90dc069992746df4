"""What a worker tells its driver when it cannot go on."""

import subprocess
import sys
import textwrap

from ftray.store.paths import Storage
from ftray.store.runs import RunFolder

EVALUATION_OF_DATA_THAT_IS_GONE = """
    import sys

    import torch.distributed as dist

    from ftray.config.schema import Run
    from ftray.train.layout import Layout
    from ftray.train.worker import Job, train_loop

    root = sys.argv[1]
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=0, world_size=1)
    run = Run.model_validate({"name": "demo", "storage": root, "data": {"sources": "rows.jsonl"}})
    layout = Layout(
        workers=1,
        device="cpu",
        gpus_per_worker=0,
        cpus_per_worker=1,
        zero=0,
        offload="none",
        nvme_path=None,
        dtype="fp32",
        attention="sdpa",
        packing=False,
        micro_batch_size=1,
        gradient_checkpointing=False,
    )
    train_loop(
        Job(
            run=run.model_dump(mode="json"),
            layout=layout,
            schedule=None,
            data_key="data/gone",
            base="",
            born="",
            folder="demo.evaluation",
            version_key="adapters/demo/v1",
        )
    )
"""


def test_an_evaluation_leaves_its_verdict_in_its_own_folder_whatever_became_of_the_training(tmp_path):
    storage = Storage(str(tmp_path))
    training, evaluation = RunFolder(storage, "demo"), RunFolder(storage, "demo.evaluation")
    training.set_verdict("TrainError", "step 7: the loss is not a number")
    code = textwrap.dedent(EVALUATION_OF_DATA_THAT_IS_GONE)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no prepared data set here" in evaluation.verdict()["message"]
    assert training.verdict()["kind"] == "TrainError"
