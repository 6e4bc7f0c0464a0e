"""Weights spread over two processes by FSDP2: what is sampled, saved and exported is the whole model."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

from palm_rlhf_pytorch.policy.sharding import asks_for_sharding
from tests.distributed.ranks import in_ranks
from tests.distributed.runs import run_and_resume, sharded_run, taken_up, trained_run

BASE = {"actor_lora": False, "critic_lora": False}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="lora"),
        pytest.param({**BASE, "palm_options": {"qk_rmsnorm": True}}, id="base", marks=pytest.mark.slow),
    ],
)
def test_a_sharded_run_trains_and_one_process_goes_on_with_it(tmp_path, options):
    first, second = in_ranks(tmp_path / "ranks", sharded_run, fsdp=True, run_dir=tmp_path / "run", **options)
    assert set(first["sharded"]) == {"DTensor"}
    assert all(first["empty"])  # no process holds a weight it was not given
    assert first["history"] == second["history"] and first["history"][1]["policy/grad_norm"] > 0
    assert first["weights"] == second["weights"] and first["model"] == second["model"]
    assert first["answer"][:5] == second["answer"][:5] == [3, 1, 4, 1, 5]
    assert first["answer"] != second["answer"]  # each process draws its own
    assert "knows no FSDP" in first["refused"]
    [one] = in_ranks(tmp_path / "one", taken_up, ranks=1, saved=tmp_path / "run" / "saved", **options)
    assert one["weights"] == first["weights"] and one["model"] == first["model"]
    assert one["steps"] > 0 and one["history"][-1]["policy/skipped_steps"] == 0


@pytest.mark.slow
def test_a_sharded_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path):
    ranks = in_ranks(tmp_path / "stopped", run_and_resume, fsdp=True, run_dir=tmp_path / "run", fault="sigterm")
    alone = in_ranks(tmp_path / "alone", trained_run, fsdp=True, run_dir=tmp_path / "left")
    for (ended, resumed), undisturbed in zip(ranks, alone, strict=True):
        assert ended["stopped"] == "SIGTERM" and undisturbed["stopped"] is None
        assert ended["weights"] != resumed["weights"] == undisturbed["weights"]


class Settings:
    """What is asked of an accelerator; its attributes are given."""

    def __init__(self, kind, *, version=2, offload=None, scaler=None):
        self.distributed_type, self.scaler = kind, scaler
        self.state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version, cpu_offload=offload))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(DistributedType.DEEPSPEED), "accelerate is set to DEEPSPEED"),
        (Settings(DistributedType.FSDP, version=1), r"fsdp_version \(1\) must be 2"),
        (Settings(DistributedType.FSDP, offload=CPUOffloadPolicy()), "fsdp_offload_params"),
        (Settings(DistributedType.FSDP, scaler=object()), "fp16"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        asks_for_sharding(settings)


@pytest.mark.parametrize(
    ("kind", "flag", "asked"),
    [
        (DistributedType.FSDP, None, True),
        (DistributedType.MULTI_CPU, "true", True),
        (DistributedType.MULTI_CPU, None, False),
        (DistributedType.NO, "true", False),
    ],
)
def test_sharding_is_asked_for_by_accelerate_alone(monkeypatch, kind, flag, asked):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if flag:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", flag)
    assert asks_for_sharding(Settings(kind)) is asked
