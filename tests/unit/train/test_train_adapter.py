from __future__ import annotations

import math

import pytest
import torch

from tests.unit.train import jobs
from tests.unit.train.conftest import LENGTHS, MODULE, N_STEPS, RECIPE
from workflow_scripts import files
from workflow_scripts.handover.training import Evaluation
from workflow_scripts.log import StageError
from workflow_scripts.packing.packing import Piece, Pieces, best_fit
from workflow_scripts.packing.plan import read_plan
from workflow_scripts.tokens.documents import Documents
from workflow_scripts.train.adapter_files import read_history


def test_the_adapter_loads_and_moves_the_base(whole_run, checkpoint):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, str(whole_run.folder / "adapter"))(tokens).logits
    assert (after - before).abs().max() > 0.1
    assert {path.name for path in (whole_run.folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "history.json",
        "training_manifest.json",
    }


def test_the_history_has_every_step_and_a_gradient_in_each(whole_run):
    train = whole_run.history.train
    assert [entry.step for entry in train] == list(range(1, N_STEPS + 1))
    for entry in train:
        assert entry.model_dump().keys() == {
            "step",
            "loss_nats_per_token",
            "gradient_norm",
            "learning_rate",
        }
        assert math.isfinite(entry.loss_nats_per_token)
        assert 0 < entry.gradient_norm < math.inf
    assert [entry.step for entry in whole_run.history.validation] == [3, 5]
    for entry in whole_run.history.validation:
        assert entry.model_dump().keys() == {"step", "loss_nats_per_token", "perplexity"}


def test_the_manifest_describes_the_run(whole_run, prepared):
    manifest = whole_run.manifest
    assert manifest.n_steps == N_STEPS
    assert manifest.resumed is False
    assert manifest.tokens_per_second > 0
    assert manifest.duration_seconds > 0
    assert manifest.peak_memory_bytes > 2**20
    assert manifest.final_loss_nats_per_token == (whole_run.history.train[-1].loss_nats_per_token)
    n_weights = sum(tensor.numel() for tensor in whole_run.weights().values())
    assert manifest.n_trainable_parameters == n_weights
    identity = manifest.identity
    assert identity.plan == files.sha256(prepared.plan)
    assert identity.tokens == files.sha256(prepared.tokens / "train.arrow")
    assert identity.base == {
        "model.safetensors": files.sha256(prepared.checkpoint / "model.safetensors")
    }
    assert identity.recipe.max_steps == N_STEPS
    n_rows = len(best_fit(Pieces.whole(LENGTHS), row_tokens=256, seed=0))
    assert manifest.tokens_per_step == pytest.approx(sum(LENGTHS) / n_rows)


def test_after_success_no_checkpoint_is_left(whole_run):
    assert list((whole_run.folder / "resume").iterdir()) == []


def entry(step, **values):
    return {"step": step, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, **values}


def test_the_history_keeps_steps_and_evaluations_apart():
    log_history = [entry(1), {"step": 1, "eval_loss": 3.0}, entry(2), {"step": 2, "runtime": 1}]
    history = read_history(log_history)
    assert [row.step for row in history.train] == [1, 2]
    evaluated = Evaluation(step=1, loss_nats_per_token=3.0, perplexity=math.exp(3.0))
    assert history.validation == (evaluated,)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("loss", math.nan, "step 2, loss_nats_per_token"),
        ("grad_norm", math.inf, "step 2, gradient_norm"),
    ],
)
def test_a_step_that_is_not_finite_is_a_stage_error(key, value, named):
    with pytest.raises(StageError, match="diverged") as caught:
        read_history([entry(1), entry(2, **{key: value})])
    assert named in str(caught.value)


def test_a_run_whose_every_gradient_is_zero_is_a_stage_error():
    history = [entry(1, grad_norm=0.0), entry(2, grad_norm=0.0)]
    with pytest.raises(StageError, match="training changed nothing"):
        read_history(history)
    assert read_history([entry(1, grad_norm=0.0), entry(2)])


@pytest.mark.parametrize(
    ("epochs", "per_step", "max_steps", "expected"),
    [(1.0, 1, None, 5), (1.0, 2, None, 3), (2.5, 2, None, 8), (2.5, 2, 6, 6), (0.3, 1, None, 2)],
)
def test_the_number_of_steps_follows_from_rows_and_epochs(
    checkpoint, facts, random_documents, plan_of, tmp_path, epochs, per_step, max_steps, expected
):
    from workflow_scripts.models.checkpoint import load_model
    from workflow_scripts.settings import RecipeSettings

    documents = random_documents(tmp_path / "train.arrow", [6] * 5)
    plan = plan_of([[Piece(n, 0, 6)] for n in range(5)], row_tokens=16)
    recipe = RecipeSettings(epochs=epochs, rows_per_step=per_step, max_steps=max_steps)
    model = load_model(checkpoint, window=8, precision="float32")
    job = jobs.make_job(facts, plan, documents, recipe)
    trainer = jobs.trainer_of(model, job, tmp_path / "run")
    assert trainer.args.max_steps == expected


def test_the_error_for_indivisible_rows_names_a_number_that_works(
    checkpoint, facts, random_documents, plan_of, tmp_path
):
    from workflow_scripts.models.checkpoint import load_model
    from workflow_scripts.settings import RecipeSettings

    documents = random_documents(tmp_path / "train.arrow", [6] * 5)
    plan = plan_of([[Piece(n, 0, 6)] for n in range(5)], row_tokens=16)
    job = jobs.make_job(facts, plan, documents, RecipeSettings(rows_per_step=8))
    model = load_model(checkpoint, window=8, precision="float32")
    with pytest.raises(StageError, match="divided evenly") as caught:
        jobs.trainer_of(model, job, tmp_path / "run", rows_per_micro_batch=3)
    assert "8 rows for 1 processes × 3 rows" in str(caught.value)
    assert "such as 9" in str(caught.value)


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help(MODULE)
    assert done.returncode == 0
    assert "--resume-from" in done.stdout
    assert not imported & {"torch", "transformers", "peft"}


def test_the_validation_loss_of_training_equals_evaluate_perplexity(
    whole_run, prepared, tmp_path, random_documents
):
    """At the last step, for the written adapter, on the same supervised tokens."""
    from workflow_scripts.evaluate import evaluate_perplexity

    scores = tmp_path / "scores.json"
    evaluate_perplexity.main(
        [
            *("--checkpoint", str(prepared.checkpoint), "--precision", "nf4"),
            *("--adapter", str(whole_run.folder / "adapter")),
            *("--facts", str(prepared.facts), "--tokens"),
            *(str(prepared.tokens / "validation.arrow"), "--settings", "{}"),
            *("--threads", "1", "--scores", str(scores)),
            *("--token-scores", str(tmp_path / "scores.tokens.parquet")),
        ]
    )
    last = whole_run.history.validation[-1]
    assert last.step == N_STEPS
    found = files.read_json(scores)
    assert found["n_pieces"] > found["n_conversations"]  # cut at the window, as the chain cuts
    assert last.loss_nats_per_token == pytest.approx(found["loss_nats_per_token"], rel=1e-5)
    assert last.perplexity == pytest.approx(found["perplexity"], rel=1e-5)


@pytest.mark.parametrize("honours_window", [True, False])
def test_a_window_that_is_not_honoured_is_absent_in_training(prepared, tmp_path, honours_window):
    from transformers import AutoConfig, AutoModelForCausalLM

    n_rows = len(read_plan(prepared.plan).rows)
    recipe = {"method": "lora", "rows_per_step": n_rows, "max_steps": 1, "evaluations": 0}
    run = prepared.run({**RECIPE, **recipe, "honours_window": honours_window}, tmp_path)
    config = AutoConfig.from_pretrained(prepared.checkpoint)
    assert config.sliding_window == 8
    if not honours_window:
        config.sliding_window = None
    model = AutoModelForCausalLM.from_pretrained(
        prepared.checkpoint, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    nats, n_tokens = 0.0, 0
    for document in Documents(prepared.tokens / "train.arrow"):
        ids = torch.from_numpy(document.input_ids.astype("int64"))[None]
        with torch.no_grad():
            likelihoods = model(ids).logits[0, :-1].log_softmax(-1)
        found = likelihoods.gather(1, ids[0, 1:, None])[:, 0]
        supervised = torch.from_numpy(document.is_supervised[1:])
        nats -= float(found[supervised].sum())
        n_tokens += int(supervised.sum())
    loss = run.history.train[0].loss_nats_per_token
    # Measured 8e-8 and 9e-9; the two references are 4e-3 apart.
    assert loss == pytest.approx(nats / n_tokens, rel=1e-5)
