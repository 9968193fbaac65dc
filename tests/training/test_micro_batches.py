"""The batches of a training."""

from tiny_training import before_each_batch, curriculum_of, same_bits, train, trainer_of, weights_of


def test_a_budget_of_tokens_holds_through_orders_that_are_measured_anew(tmp_path):
    options = {"signals": "answer_length", "stages": 2, "epochs_per_stage": 2, "tokens_per_batch": 100}
    trainer = trainer_of(tmp_path, count=20, remeasure=True, **options)
    trainer.train()
    total = trainer.planned().total_steps
    assert trainer.state.global_step == trainer.state.max_steps == total
    assert (tmp_path / f"checkpoint-{total}").exists()


def test_a_budget_of_tokens_bounds_every_batch(tmp_path, monkeypatch):
    tokens = []
    before_each_batch(monkeypatch, lambda n, trainer, samples: tokens.append(sum(map(len, samples))))
    train(tmp_path, curriculum=curriculum_of(20, stages=1), tokens_per_batch=100)
    assert max(tokens) <= 100
    assert sum(tokens[:-1]) / (len(tokens) - 1) > 60  # a sample has about 30


def test_several_workers_prepare_the_same_batches(tmp_path):
    setting = {"curriculum": curriculum_of(12, stages=2), "learning_rate": 1e-3}
    one = train(tmp_path / "one", **setting)
    two = train(tmp_path / "two", **setting, dataloader_num_workers=1)
    assert same_bits(weights_of(one), weights_of(two))
