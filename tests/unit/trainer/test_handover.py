"""Full weights by broadcast, from the trainer's loop: announced, claimed, sent; and how that ends early."""

import threading
import time
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from support.batches import ConfigOf, make_batch
from support.weights_taker import taking
from turnwise.config import RLConfig
from turnwise.trainer import handover, loop
from turnwise.trainer.checkpoint_index import checkpoint_steps
from turnwise.trainer.handover import Handover, check_names
from turnwise.trainer.loop import run_trainer
from turnwise.trainer.publish import PublishError, full_tensors
from turnwise.trainer.step import Learner
from turnwise.transport import BatchLog, Control, RunDir, WeightsStore, plan_buckets, tensor_digest

BROADCAST: dict[str, Any] = {"model": {"lora": None}, "weight_transfer": "broadcast"}


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "plan_buckets", lambda specs: plan_buckets(specs, limit_bytes=2**16))


def write_batches(config: RLConfig, *steps: int) -> RunDir:
    run_dir = RunDir(config.output_dir)
    for step in steps:
        BatchLog(run_dir.batches).write(make_batch(step))
    return run_dir


def test_every_version_is_taken_as_it_was_announced(config_of: ConfigOf) -> None:
    config = config_of(BROADCAST, max_steps=3)
    run_dir = write_batches(config, 1, 2, 3)
    store = WeightsStore(run_dir.weights)
    with taking(store, 3) as taker:
        run_trainer(config)
    announced = {version: ready.digest for version in store.versions() if (ready := store.poll(version)) is not None}
    assert taker.taken == {0: taker.taken[0], **announced}
    assert len(set(taker.taken.values())) == 4  # each step moved the policy
    assert checkpoint_steps(run_dir.root) == [3]
    ready = store.poll(3)
    assert ready is not None
    assert ready.metrics["timing/wait_claim_s"] > 0
    assert sorted(path.name for path in store.path(3).iterdir()) == ["claim.json", "manifest.json", "ready.json"]


def test_what_is_sent_has_the_type_and_the_names_of_the_model_in_which_it_computes(
    config_of: ConfigOf, device: torch.device
) -> None:
    config = config_of(BROADCAST, model={"name": config_of().model.name, "dtype": "bfloat16"})
    learner = Learner(config, device)
    run_dir = RunDir(config.output_dir)
    store = WeightsStore(run_dir.weights)
    giver = Handover(learner, store, Control(run_dir.root))
    giver.announce(0, {}, keep=2)
    with taking(store, 0) as taker:
        assert giver.send()
    giver.close()
    wanted = full_tensors(learner)
    assert {parameter.dtype for parameter in learner.parameters.values()} == {torch.float32}
    assert taker.tensors == {name: ("torch.bfloat16", tuple(tensor.shape)) for name, tensor in wanted.items()}
    assert taker.taken == {0: tensor_digest(wanted)}


def test_a_request_to_stop_ends_a_trainer_that_waits_for_a_claim(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "HEARTBEAT_S", 0.05)
    config = config_of(BROADCAST, max_steps=9)
    run_dir = write_batches(config, 1, 2)
    store = WeightsStore(run_dir.weights)

    def stop_when_announced() -> None:
        while store.poll(1) is None:
            time.sleep(0.02)
        time.sleep(0.2)  # several heartbeats
        Control(run_dir.root).request_stop("interrupted", "Ctrl-C")

    thread = threading.Thread(target=stop_when_announced)
    thread.start()
    with taking(store, 0):
        run_trainer(config)
    thread.join()
    assert store.versions() == [0, 1]  # the second batch was there, and was left alone
    assert checkpoint_steps(run_dir.root) == [1]
    assert "stopping after step 1: Ctrl-C" in capsys.readouterr().out


def test_a_resumed_trainer_announces_its_version_anew(config_of: ConfigOf) -> None:
    config = config_of(BROADCAST, max_steps=2, ckpt={"interval": 1})
    run_dir = write_batches(config, 1, 2)
    store = WeightsStore(run_dir.weights)
    with taking(store, 2) as first:
        run_trainer(config)
    store.forget_after(1)  # as `rl --resume` does before anything starts
    assert store.versions() == []
    with taking(store, 2, first=1) as second:
        run_trainer(config, resume_step=1)
    assert second.taken == {version: first.taken[version] for version in (1, 2)}


def test_engines_that_give_up_end_the_trainer_with_their_words(config_of: ConfigOf) -> None:
    config = config_of(BROADCAST, max_steps=3)
    run_dir = write_batches(config, 1, 2, 3)
    with (
        taking(WeightsStore(run_dir.weights), 1, drop_at=1),
        pytest.raises(PublishError, match=r"did not get the weights: .*v1.*worker 1: v1 could not be loaded.*rl --resume"),
    ):
        run_trainer(config)


def test_engines_that_give_up_in_a_run_that_ends_anyway_cost_no_checkpoint(config_of: ConfigOf) -> None:
    config = config_of(BROADCAST, max_steps=3)
    run_dir = write_batches(config, 1, 2, 3)
    stop = Control(run_dir.root)
    with taking(
        WeightsStore(run_dir.weights), 1, drop_at=1, at_drop=lambda: stop.request_stop("failed", "the orchestrator died")
    ):
        run_trainer(config)
    assert checkpoint_steps(run_dir.root) == [1]


def test_a_model_whose_tensors_have_other_names_in_files_is_refused(config_of: ConfigOf, device: torch.device) -> None:
    """transformers fuses the experts of a mixture in memory, and takes them apart in files."""
    tiny: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    experts = AutoModelForCausalLM.from_config(MixtralConfig(**tiny, **heads))
    with pytest.raises(PublishError, match=r"than it has in memory \(model\.layers\.0\..*; train it with LoRA"):
        check_names(experts, dict(experts.named_parameters()))
    plain = Learner(config_of(BROADCAST), device)
    check_names(plain.policy.model, plain.parameters)
