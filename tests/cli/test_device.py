"""Devices that an option names."""

import argparse

import pytest
import torch

from palm_rlhf_pytorch.cli.device import device_of, training_device


@pytest.mark.parametrize("name", ["meta", "xpu", "xla", "vulkan", "cuda:-1", "tpu", ""])
@pytest.mark.parametrize("ask", [device_of, training_device])
def test_a_device_that_no_model_runs_on_is_refused(name, ask):
    with pytest.raises(ValueError, match=f"--device {name}.*use cpu, cuda, cuda:1 or mps"):
        ask(argparse.Namespace(device=name))


def test_cpu_is_taken_by_its_name():
    assert device_of(argparse.Namespace(device="cpu")) == training_device(argparse.Namespace(device="cpu"))
    assert device_of(argparse.Namespace(device="cpu")) == torch.device("cpu")
