"""Every trainer tells its trackers what it is, each line of its metrics, and samples where it has some."""

import pytest
import torch
from accelerate.tracking import GeneralTracker

from palm_rlhf_pytorch.policy.rejection import RejectionTrainer
from palm_rlhf_pytorch.training.metrics import read_metrics
from tests.policy.direct_runs import make_dpo, make_kto, tiny_palm


class Notebook(GeneralTracker):
    """Writes down what it is given."""

    name, requires_logging_directory = "notebook", False

    def __init__(self):
        super().__init__()
        self.config, self.lines, self.tables, self.finished = {}, [], [], 0

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        assert all(isinstance(value, int | float | str) for value in values.values())
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.lines.append({"step": step, **values})

    def log_table(self, table_name, columns=None, data=None, step=None):
        self.tables.append((step, [dict(zip(columns, row, strict=True)) for row in data]))

    def finish(self):
        self.finished += 1


def count_sevens(sequences, *, prompt_mask, mask):
    return ((sequences == 7) & mask & ~prompt_mask).sum(dim=-1).float()


def make_rejection(**options):
    prompts = [torch.tensor(ids) for ids in ([3, 1], [9], [2, 6, 4])]
    return RejectionTrainer(
        palm=tiny_palm(), reward_model=count_sevens, prompt_token_ids=prompts, num_samples=5, minibatch_size=4,
        accelerate_kwargs={"cpu": True}, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "call", "config"),
    [
        (make_dpo, {"num_steps": 3}, {"trainer": "DPOTrainer", "lr": 0.01, "palm.dim": 12, "num_steps": 3}),
        (make_kto, {"num_steps": 2}, {"trainer": "KTOTrainer", "minibatch_size": 4}),
        (make_rejection, {"num_rounds": 2, "prompts_per_round": 9, "max_new_tokens": 4}, {"num_samples": 5}),
    ],
)
def test_trackers_get_the_lines_of_the_metrics_file(make, call, config, tmp_path):
    notebook = Notebook()
    make(run_dir=tmp_path, log_with=notebook).train(use_tqdm=False, **call)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert notebook.lines == lines and len(lines) == next(iter(call.values()))
    assert config.items() <= notebook.config.items() and notebook.finished == 1


def test_ppo_sends_tables_of_samples_now_and_then_and_closes_after_an_error(make_trainer):
    notebook = Notebook()
    trainer = make_trainer(log_with=notebook, log_samples_every=2, keep_samples=1, accelerate_kwargs={"cpu": True})
    call = {"max_seq_len": 9, "update_timesteps": 4, "use_tqdm": False, "preflight": False}
    trainer.train(12, **call)
    assert [step for step, _ in notebook.tables] == [1, 3]  # without a folder, too
    best, worst = notebook.tables[0][1]
    assert (best["kind"], worst["kind"]) == ("best", "worst") and best["score"] >= worst["score"]
    assert len(best["response"]) == best["length"] and isinstance(best["kl"], float)
    assert notebook.config["call.update_timesteps"] == 4 and notebook.config["eps_clip"] == 0.2

    def failing(*args, **kwargs):
        raise RuntimeError("the judge is ill")

    trainer.reward_model = failing
    with pytest.raises(RuntimeError, match="ill"):
        trainer.train(4, **call)
    assert notebook.finished == 2 and not trainer.accelerator.trackers
