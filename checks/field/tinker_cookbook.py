# library: tinker-cookbook
# file: tinker_cookbook/rl/data_processing.py
"""The Tinker cookbook's group-centred advantages; its loss runs on the server."""

import types

import torch

from checks.alone import load_alone

rl = load_alone("tinker_cookbook", "rl/data_processing.py")


def group_advantages(rewards):
    groups = [types.SimpleNamespace(get_total_rewards=row.tolist) for row in rewards]
    return torch.stack(rl.compute_advantages(groups))
