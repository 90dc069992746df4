"""What is known of a machine before Ray is started on it, and what is said meanwhile."""

from ftray.train.cluster import quiet, this_machine

NVIDIA_SMI = """#!/bin/sh
echo '81559, NVIDIA H100 80GB HBM3'
echo '24564, NVIDIA GeForce RTX 4090'
"""


def test_this_machine_has_the_memory_of_its_smallest_gpu_and_the_name_of_its_first(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (node,) = this_machine()
    assert (node.gpus, node.gpu_bytes, node.gpu_kind) == (2, 24564 * 2**20, "NVIDIA H100 80GB HBM3")


def test_a_machine_without_nvidia_smi_has_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (node,) = this_machine()
    assert (node.gpus, node.gpu_bytes, node.gpu_kind) == (0, 0, "")
    assert node.cpus >= 1


def test_what_a_library_prints_does_not_stand_in_the_way_of_json(capsys):
    with quiet():
        print("[2026-11-28] [WARNING] Setting accelerator to CPU")
    said = capsys.readouterr()
    assert not said.out
    assert "accelerator" in said.err
