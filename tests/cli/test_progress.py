"""What a person sees of a run, on the screen and in TensorBoard."""

from tests.training.running import train


def test_events_hold_the_loss_of_every_step(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tiny, "--name", "events").exit_code == 0
    events = EventAccumulator(str(tmp_path / "runs" / "events")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Scalars("train/occupancy")[-1].value == 1.0
