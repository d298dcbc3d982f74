"""Between two steps of the optimizer."""

from __future__ import annotations

from mmengine.runner import Runner


def between_steps(runner: Runner) -> bool:
    """Whether all gradients so far have gone into the weights: not in the middle of an accumulation."""
    wrapper = runner.optim_wrapper
    return not hasattr(wrapper, 'should_update') or wrapper.should_update()
