"""2N steps equal N steps, a restart from the files, and N more: bit for bit."""

from guided_diffusion.training.saver import Checkpoints

from .toys import Counter, assert_same_state, batches, make, toy_net


def fresh(directory, **options):
    net = toy_net(dropout=0.5)
    return make(
        net, schedule_sampler=Counter(), lr_anneal_steps=100, checkpoints=Checkpoints(str(directory)), **options
    )


def run_twice(tmp_path, **options):
    whole = fresh(tmp_path / "whole", **options)
    whole.run(8)
    first = fresh(tmp_path / "parts", **options)
    first.run(4)
    first.checkpoints.close()
    second = fresh(tmp_path / "parts", **options)
    lines = second.restore(second.checkpoints.find("auto"))
    assert second.steps_done == 4
    second.run(8)
    assert_same_state(whole.state_dict(), second.state_dict())
    return lines


def test_resume_is_exact(tmp_path):
    lines = run_twice(tmp_path)
    assert not any("not saved" in line for line in lines)


def test_resume_is_exact_with_microbatches_and_float16(tmp_path):
    run_twice(tmp_path, microbatch=3, precision="fp16", max_grad_norm=0.5)


def test_resume_is_exact_for_averages_that_depend_on_the_step(tmp_path):
    run_twice(tmp_path, ema_rates=(0.9,), ema_sigma_rels=(0.05, 0.1))


def test_resume_through_memory():
    whole, first, second = make(), make(), make()
    whole.run(6)
    first.run(3)
    second.load_state_dict(first.state_dict())
    second.run(6)
    assert_same_state(whole.state_dict(), second.state_dict())


def test_data_at_the_wrong_step_is_refused():
    trainer = make(batches=batches(5))
    try:
        trainer.run(1)
    except ValueError as error:
        assert "step 5" in str(error)
    else:
        raise AssertionError("not refused")
