"""What some versions of torch lack, or charge too much for. Each entry says when it can go."""

from __future__ import annotations

from collections.abc import Callable


def assume_constant_result(function: Callable) -> Callable:
    """As torch.compiler.assume_constant_result: torch.compile takes the function's result as a constant.

    That decorator imports torch._dynamo, which costs every program 1.3 s that compiles nothing. It can be used again
    when torch imports torch._dynamo lazily there (not in 2.11).
    """
    function._dynamo_marked_constant = True
    return function
