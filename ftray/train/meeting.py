"""How the workers of a group find each other: as Ray Train does it, over the network that Ray reaches each of them by.

gloo looks its own address up by the machine's name, and many systems give that name a loopback address in /etc/hosts:
workers on several machines would then wait for each other in vain.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class Meeting(TorchConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _Meeting


class _Meeting(_TorchBackend):
    def on_start(self, worker_group, backend_config):
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


def name_interface() -> None:
    """On a worker: gloo takes the interface with the node's address, unless the user named one."""
    import ray.util

    if (found := interface_of(ray.util.get_node_ip_address())) is not None:
        os.environ.setdefault(INTERFACE, found)


def interface_of(address: str) -> str | None:
    """The network interface with this address, e.g. eth0; None where this machine has none."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    return None
