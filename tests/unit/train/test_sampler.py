from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from workflow_scripts.packing.balance import NO_ROW, step_imbalance
from workflow_scripts.packing.packing import Piece
from workflow_scripts.train.sampler import StepSampler

SHAPE = {"micro_batches_per_step": 2, "rows_per_micro_batch": 2}


@pytest.fixture(scope="module")
def plan(plan_of):
    lengths = np.random.default_rng(0).integers(10, 1000, size=101).tolist()
    return plan_of([[Piece(at, 0, length)] for at, length in enumerate(lengths)])


def sampler_of(plan, *, n_ranks=3, seed=0):
    return StepSampler(plan, n_ranks=n_ranks, seed=seed, **SHAPE)


def test_accelerate_gives_each_process_the_rows_intended_for_it(plan):
    from accelerate.data_loader import BatchSamplerShard

    sampler = sampler_of(plan)
    batches = DataLoader(range(1), batch_size=2, sampler=sampler).batch_sampler
    order = sampler.order()
    for rank in range(3):
        found = list(BatchSamplerShard(batches, num_processes=3, process_index=rank))
        assert np.array_equal(np.reshape(found, (-1, 2, 2)), order[:, :, rank])


def test_an_epoch_has_every_row_once_and_fills_up_its_last_step(plan):
    sampler = sampler_of(plan)
    counts = Counter(sampler)
    assert counts.pop(NO_ROW) == 108 - 101
    assert counts == Counter(range(101))
    assert len(sampler) == len(list(sampler)) == 108
    assert sampler.n_steps == len(sampler.order()) == 9


def test_epoch_and_seed_decide_the_order(plan):
    sampler = sampler_of(plan)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(sampler_of(plan, seed=1)) != first
    later = sampler_of(plan, seed=1)
    later.set_epoch(0)
    assert list(later) not in (first, second)


def test_processes_share_the_cost(plan):
    costs = plan.training_flops
    balanced = sampler_of(plan).order()[:-1]
    drawn = np.random.default_rng(0).permutation(101)[: balanced.size].reshape(balanced.shape)
    assert step_imbalance(costs, balanced).mean() < 1.03 < step_imbalance(costs, drawn).mean()


def test_the_trainer_takes_each_epoch_in_the_samplers_order(
    checkpoint, facts, random_documents, plan_of, tmp_path
):
    from tests.unit.train import jobs
    from workflow_scripts.settings import RecipeSettings
    from workflow_scripts.train.model import trainable_model

    lengths = [5, 9, 3, 8, 6]
    documents = random_documents(tmp_path / "train.arrow", lengths)
    plan = plan_of([[Piece(at, 0, length)] for at, length in enumerate(lengths)])
    recipe = RecipeSettings(epochs=2, rank=8, evaluations=0, rows_per_step=2)
    model = trainable_model(checkpoint, facts, recipe)
    trainer = jobs.trainer_of(model, jobs.make_job(facts, plan, documents, recipe), tmp_path)
    seen = []
    model.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(options["input_ids"].shape[1]),
        with_kwargs=True,
    )
    trainer.train()
    sampler = StepSampler(plan, n_ranks=1, seed=0, micro_batches_per_step=2, rows_per_micro_batch=1)
    expected = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        expected += [1 if row == NO_ROW else lengths[row] for row in sampler]
    assert seen == expected
